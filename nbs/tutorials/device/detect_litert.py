"""Detects objects on a Raspberry Pi: python detect_litert.py model.tflite photo.jpg [lowest score]

Needs: pip install ai-edge-litert numpy pillow
"""
import json
import sys
import zipfile

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image

if len(sys.argv)<3: sys.exit(__doc__)
model, photo, lowest = (*sys.argv[1:4], .3)[:3]
with zipfile.ZipFile(model) as archive:
    labels = archive.read('labels.txt').decode().splitlines()
    settings = json.loads(archive.read('effdet_nb.json'))['input']

interpreter = Interpreter(model, num_threads=4)
interpreter.allocate_tensors()
entry, = interpreter.get_input_details()
_, height, width, _ = entry['shape']

image = Image.open(photo).convert('RGB')
if settings['resize'] == 'stretch': scale_y, scale_x = height/image.height, width/image.width
else: scale_y = scale_x = min(height/image.height, width/image.width)
new_width, new_height = max(1, int(image.width*scale_x+1e-6)), max(1, int(image.height*scale_y+1e-6))
part = 0, 0, min(new_width/scale_x, image.width), min(new_height/scale_y, image.height)   # what fills whole pixels
small = image.resize((new_width, new_height), Image.BILINEAR, part)
pixels = np.full((1, height, width, 3), settings['padding'], np.uint8)
pixels[0, :small.height, :small.width] = small

interpreter.set_tensor(entry['index'], pixels)
interpreter.invoke()
boxes, classes, scores, count = (interpreter.get_tensor(o['index'])[0] for o in interpreter.get_output_details())
for box, c, score in list(zip(boxes, classes, scores))[:int(count)]:
    if score < float(lowest): break
    box = box*[height, width, height, width]/[scale_y, scale_x, scale_y, scale_x]
    y1, x1, y2, x2 = np.clip(box, 0, [image.height, image.width]*2)
    print(f'{labels[int(c)]} {score:.2f}: left {x1:.0f}, top {y1:.0f}, right {x2:.0f}, bottom {y2:.0f}')
