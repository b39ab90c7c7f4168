"""The same work as `faceprior bench`, in PyTorch and its friends.

Each module offers `prepare(work, form, ...)`, which returns one iteration as a callable and the number of items
(pictures) that it handles. Parameter names are those of the published checkpoints, so that `compare.py --check` can
prove with the repository's goldens that these are the same networks.
"""
