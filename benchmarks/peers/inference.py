"""Forms of inference of one network on one batch."""

import torch


def prepare(net, images, form, folder, threads):
    """What runs `net` on `images` once, in eval mode and without gradients."""
    net.eval()
    if form == "onnxruntime":
        return onnxruntime_session(net, images, folder, threads)
    if form != "contiguous":
        net, images = net.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    if form == "jit":
        with torch.no_grad():
            net = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(net, images)))
            for _ in range(3):  # it specialises itself in its first calls
                net(images)

    def infer():
        with torch.inference_mode():
            return net(images)

    return infer


def onnxruntime_session(net, images, folder, threads):
    import onnxruntime

    path = f"{folder}/net.onnx"
    torch.onnx.export(net, (images,), path, input_names=["images"], dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])
