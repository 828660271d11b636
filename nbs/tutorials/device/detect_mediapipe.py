"""Detects objects with MediaPipe: python detect_mediapipe.py model.tflite photo.jpg [lowest score]

Needs: pip install mediapipe
"""
import sys

import mediapipe
from mediapipe.tasks.python import BaseOptions, vision

if len(sys.argv)<3: sys.exit(__doc__)
model, photo, lowest = (*sys.argv[1:4], .3)[:3]
options = vision.ObjectDetectorOptions(BaseOptions(model_asset_path=model), score_threshold=float(lowest))
with vision.ObjectDetector.create_from_options(options) as detector:
    result = detector.detect(mediapipe.Image.create_from_file(photo))
for found in result.detections:
    best, box = found.categories[0], found.bounding_box
    right, bottom = box.origin_x+box.width, box.origin_y+box.height
    print(f'{best.category_name} {best.score:.2f}: left {box.origin_x}, top {box.origin_y}, '
          f'right {right}, bottom {bottom}')
