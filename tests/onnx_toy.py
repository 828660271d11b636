"A network of a few operators with the outputs of a detector, so that what comes after a network can be tested without one."
import numpy as np

from effdet_nb.detector.anchors import all_anchors


def toy_onnx_model(num_classes=3, image_hw=(128, 128), batch='batch', seed=0, opset=17, spread=3.):
    "An exported graph without ending: random answers, to which a picture adds its mean brightness."
    from onnx import parser
    from onnx.numpy_helper import from_array
    from effdet_nb.export.onnx_graph import set_metadata, build_metadata
    rng, num_anchors = np.random.default_rng(seed), len(all_anchors(image_hw))
    h, w = image_hw
    axes = 'ReduceMean<axes = [1,2,3], keepdims = 1>(input)' if opset < 18 else 'ReduceMean<keepdims = 1>(input, axes)'
    proto = parser.parse_model(f'''
<ir_version: 8, opset_import: ["" : {opset}]>
toy (float[{batch},{h},{w},3] input) => (float[{batch},{num_anchors},{num_classes}] cls_logits, float[{batch},{num_anchors},4] box_deltas)
{{
  mean = {axes}
  light = Mul(mean, thousandth)
  column = Reshape(light, shape)
  cls_logits = Add(column, logits)
  none = Mul(column, zero)
  box_deltas = Add(none, deltas)
}}''')
    f32 = np.float32
    numbers = dict(thousandth=f32(.001), zero=f32(0), shape=np.int64([0, 1, 1]), logits=f32(rng.normal(-4, spread, (1, num_anchors, num_classes))),
                   deltas=f32(rng.normal(0, .4, (1, num_anchors, 4))))
    if opset >= 18: numbers['axes'] = np.int64([1, 2, 3])
    proto.graph.initializer.extend(from_array(np.asarray(v), k) for k, v in numbers.items())
    arch = dict(name='efficientdet-d0', image_hw=list(image_hw), num_classes=num_classes, aspects=[[1., 1.], [1.4, .7], [.7, 1.4]], num_scales=3, anchor_scale=4.)
    classes = dict(ids=list(range(1, num_classes)), names=[f'thing {i}' for i in range(1, num_classes)], num_classes=num_classes)
    return set_metadata(proto, build_metadata(dict(arch=arch, classes=classes, step=3), None if batch == 'batch' else batch, opset))


def noise_images(n=2, image_hw=(128, 128), seed=0):
    "Noise, uint8 [n,h,w,3], each picture brighter than the one before."
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, 100+50*i, (*image_hw, 3)) for i in range(n)]).astype(np.uint8)


def run_onnxruntime(proto, images):
    "What ONNX Runtime says to a graph."
    import onnxruntime
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=['CPUExecutionProvider'])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {'input': np.float32(images)})))
