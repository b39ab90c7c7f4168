"""The loader's and the aligner's peers: PIL, OpenCV, facenet-pytorch."""

import random
import shutil
from pathlib import Path

import numpy as np

RESIZE, CROP = 128, 112
ALIGN_BATCH = 16

# Left eye, right eye, nose, left and right mouth corner on a picture 112 wide.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def files_under(folder):
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))


def prepare_loader(form, data):
    files = files_under(data)
    rng = random.Random(0)

    def crop_flip_float(pixels):
        x, y = rng.randint(0, RESIZE - CROP), rng.randint(0, RESIZE - CROP)
        pixels = pixels[y : y + CROP, x : x + CROP]
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        out = np.empty((3, CROP, CROP), np.float32)
        np.multiply(pixels.transpose(2, 0, 1), np.float32(2 / 255), out=out, casting="unsafe")
        out -= 1
        return out

    if form == "pil":
        from PIL import Image

        def read(path):
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB").resize((RESIZE, RESIZE), Image.Resampling.BILINEAR))

    else:
        import cv2

        cv2.setNumThreads(1)

        def read(path):
            image = cv2.resize(cv2.imread(str(path)), (RESIZE, RESIZE), interpolation=cv2.INTER_LINEAR)
            return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def iteration():
        for path in files:
            crop_flip_float(read(path))

    return iteration, len(files)


def similarity(points, template):
    """Least-squares similarity (with scale, no reflection) from points to template, as a 2x3 matrix."""
    p, q = points @ [1, 1j], template @ [1, 1j]
    centred = p - p.mean()
    a = (np.conj(centred) * (q - q.mean())).sum() / (np.abs(centred) ** 2).sum()
    t = q.mean() - a * p.mean()
    return np.array([[a.real, -a.imag, t.real], [a.imag, a.real, t.imag]])


def prepare_align(data, out, threads):
    import cv2
    from facenet_pytorch import MTCNN
    from PIL import Image

    cv2.setNumThreads(threads)
    mtcnn = MTCNN(min_face_size=40, thresholds=[0.6, 0.7, 0.7], keep_all=True)
    files, out = files_under(data), Path(out)

    def align(paths):
        images = []
        for path in paths:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        _, _, landmarks = mtcnn.detect(np.stack(images), landmarks=True)
        for path, image, faces in zip(paths, images, landmarks):
            if faces is None:
                continue
            centre = np.array(image.shape[1::-1]) / 2
            nearest = min(faces, key=lambda face: np.square(face.mean(0) - centre).sum())
            matrix = similarity(nearest.astype(np.float64), TEMPLATE)
            face = cv2.warpAffine(image[:, :, ::-1], matrix, (CROP, CROP), flags=cv2.INTER_LINEAR)
            target = (out / path.relative_to(data)).with_suffix(".jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(target), face, [cv2.IMWRITE_JPEG_QUALITY, 95])

    def size(path):
        with Image.open(path) as image:
            return image.size

    # facenet-pytorch takes batches of one size only; sorting by size costs one look at each header, outside the timing.
    by_size = {}
    for path in files:
        by_size.setdefault(size(path), []).append(path)
    batches = [
        group[i : i + ALIGN_BATCH] for group in by_size.values() for i in range(0, len(group), ALIGN_BATCH)
    ]

    def iteration():
        shutil.rmtree(out, ignore_errors=True)
        for paths in batches:
            align(paths)

    return iteration, len(files)
