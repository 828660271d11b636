"A network of a few operators with the outputs of a detector, to test what comes after a network without one."
import numpy as np

from effdet_nb.detector.anchors import all_anchors

TOY_GRAPH = '''
<ir_version: 8, opset_import: ["" : {opset}]>
toy (float[{batch},{h},{w},3] input)
=> (float[{batch},{num_anchors},{num_classes}] cls_logits, float[{batch},{num_anchors},4] box_deltas)
{{
  mean = {mean}
  brightness = Mul(mean, thousandth)
  column = Reshape(brightness, shape)
  cls_logits = Add(column, logits)
  zeros = Mul(column, zero)
  box_deltas = Add(zeros, deltas)
}}'''


def toy_onnx_model(num_classes=3, image_hw=(128, 128), batch='batch', seed=0, opset=17, spread=3.):
    "An exported graph without suppression: random outputs, to which an image adds its mean brightness."
    from onnx import parser
    from effdet_nb.export.metadata import build_metadata, set_metadata
    from effdet_nb.export.onnx_graph import add_initializer
    h, w = image_hw
    rng, num_anchors = np.random.default_rng(seed), len(all_anchors(image_hw))
    mean = 'ReduceMean<axes = [1,2,3], keepdims = 1>(input)' if opset < 18 else 'ReduceMean<keepdims = 1>(input, axes)'
    proto = parser.parse_model(TOY_GRAPH.format(
        opset=opset, batch=batch, h=h, w=w, num_anchors=num_anchors, num_classes=num_classes, mean=mean))
    f32 = np.float32
    constants = dict(
        thousandth=f32(.001), zero=f32(0), shape=np.int64([0, 1, 1]),
        logits=f32(rng.normal(-4, spread, (1, num_anchors, num_classes))),
        deltas=f32(rng.normal(0, .4, (1, num_anchors, 4))))
    if opset >= 18: constants['axes'] = np.int64([1, 2, 3])
    for name, value in constants.items(): add_initializer(proto.graph, name, value)
    meta = toy_metadata(num_classes, image_hw)
    return set_metadata(proto, build_metadata(meta, None if batch == 'batch' else batch, opset))


def toy_metadata(num_classes, image_hw):
    "Metadata of a model file."
    arch = dict(name='efficientdet-d0', image_hw=list(image_hw), num_classes=num_classes,
                aspects=[[1., 1.], [1.4, .7], [.7, 1.4]], num_scales=3, anchor_scale=4.)
    ids = list(range(1, num_classes))
    classes = dict(ids=ids, names=[f'thing {i}' for i in ids], num_classes=num_classes)
    return dict(arch=arch, classes=classes, step=3)


def noise_images(n=2, image_hw=(128, 128), seed=0):
    "Noise, uint8 [n,h,w,3], each image brighter than the one before."
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, 100+50*i, (*image_hw, 3)) for i in range(n)]).astype(np.uint8)


def run_onnxruntime(proto, images):
    "Runs a graph with ONNX Runtime, independently of the package."
    import onnxruntime
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=['CPUExecutionProvider'])
    outputs = session.run(None, {'input': np.float32(images)})
    return dict(zip([output.name for output in session.get_outputs()], outputs))
