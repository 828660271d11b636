"""Trains effdet for some epochs from ImageNet weights; bench/learning.py runs it in an environment that has effdet.

Standard input is one JSON object: images, train and val (COCO files), num_classes, size, batch, epochs, seed, threads,
optimizer, learning_rate, weights (a state dict of an EfficientNet-Lite0 in timm's order) and out. It writes
OUT-ema.json and OUT-last.json, COCO results of the averaged and of the last weights. The last line of standard output
is a JSON object: step, and cpu_seconds, those of the whole process until the end of the training. With bn_momentum,
batch norms average their statistics with it instead of effdet's 0.01.
"""
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from effdet import DetBenchPredict, DetBenchTrain, EfficientDet, get_efficientdet_config
from effdet.anchors import AnchorLabeler, Anchors
from effdet.data import DetectionDatset, create_loader
from effdet.data.parsers import CocoParserCfg, create_parser
from effdet.data.transforms import transforms_coco_eval, transforms_coco_train
from effdet.efficientdet import HeadNet
from PIL import ImageFile
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV2

ImageFile.LOAD_TRUNCATED_IMAGES = True      # one of the photographs lacks its last bytes
WARMUP, EMA_DECAY, CLIP_NORM = .05, .99, 10.     # warm-up as a share of the steps


def load_backbone(backbone, path):
    "Loads the tensors of an EfficientNet-Lite0 package: both lists have the same order, without the classifier."
    own = {k: v for k, v in backbone.state_dict().items() if not k.endswith('num_batches_tracked')}
    saved = torch.load(path, map_location='cpu', weights_only=True)
    tensors = [v for k, v in saved.items() if not k.endswith('num_batches_tracked')][:len(own)]
    assert [v.shape for v in own.values()] == [v.shape for v in tensors], 'another network'
    backbone.load_state_dict(dict(zip(own, tensors)), strict=False)


def make_network(setup):
    "effdet's lite0 with ImageNet weights, and heads for the classes of the data."
    config = get_efficientdet_config('tf_efficientdet_lite0')
    config.num_classes, config.image_size = setup['num_classes'], (setup['size'],)*2
    net = EfficientDet(config, pretrained_backbone=False)
    load_backbone(net.backbone, setup['weights'])
    net.class_net = HeadNet(config, num_outputs=config.num_classes)
    for layer in net.modules() if 'bn_momentum' in setup else ():
        if isinstance(layer, torch.nn.BatchNorm2d): layer.momentum = setup['bn_momentum']
    return net.to(memory_format=torch.channels_last), config


def make_loader(annotations, setup, config, is_training):
    "effdet's own loader, transforms and anchor labels."
    parser = create_parser('coco', cfg=CocoParserCfg(ann_filename=annotations))
    dataset = DetectionDatset(Path(setup['images']), parser)
    kwargs = dict(use_prefetcher=True, mean=config.mean, std=config.std, fill_color='mean')
    transform = transforms_coco_train if is_training else transforms_coco_eval
    anchors = Anchors.from_config(config)
    labeler = AnchorLabeler(anchors, config.num_classes, match_threshold=.5) if is_training else None
    return create_loader(dataset, config.image_size, setup['batch'], is_training, use_prefetcher=False, num_workers=0,
                         anchor_labeler=labeler, transform_fn=transform(config.image_size, **kwargs))


def as_input(images, config):
    "Normalises a batch of uint8 images as effdet's loader does on a GPU."
    mean, std = (torch.tensor(v).view(1, 3, 1, 1)*255 for v in (config.mean, config.std))
    return ((images.float()-mean)/std).contiguous(memory_format=torch.channels_last)


def learning_rate(share):
    "Linear warm-up, then a cosine, over the share of the steps that are done."
    if share < WARMUP: return max(share/WARMUP, .01)
    return (1+math.cos(math.pi*min(1, (share-WARMUP)/(1-WARMUP))))/2


def train(net, setup, config):
    "Trains for some epochs; returns the network, its moving average and the number of steps."
    bench = DetBenchTrain(net, create_labeler=False).train()
    optimizer = create_optimizer_v2(net, opt=setup['optimizer'], lr=setup['learning_rate'], weight_decay=4e-5,
                                    momentum=.9)
    average, steps, loader = ModelEmaV2(net, decay=EMA_DECAY), 0, make_loader(setup['train'], setup, config, True)
    total = setup['epochs']*len(loader)
    for _ in range(setup['epochs']):
        for images, target in loader:
            rate = setup['learning_rate']*learning_rate(steps/total)
            for group in optimizer.param_groups: group['lr'] = rate
            loss = bench(as_input(images, config), target)['loss']
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP_NORM)
            optimizer.step()
            average.update(net)
            steps += 1
    return net, average.module, steps


def coco_results(net, setup, config):
    "Returns the detections of the validation images, in COCO's format."
    loader = make_loader(setup['val'], setup, config, False)
    predictor, image_ids, results = DetBenchPredict(net).eval(), loader.dataset.parser.img_ids, []
    for images, target in loader:
        info = dict(img_scale=target['img_scale'].float(), img_size=target['img_size'].float())
        with torch.inference_mode(): batch = predictor(as_input(images, config), info).numpy()
        for index, detections in zip(target['img_idx'].tolist(), batch):
            for x1, y1, x2, y2, score, label in detections.tolist():
                results.append(dict(image_id=image_ids[index], category_id=int(label), score=score,
                                    bbox=[x1, y1, x2-x1, y2-y1]))
    return results


def main():
    setup = json.loads(sys.stdin.read())
    torch.set_num_threads(setup['threads'])
    torch.manual_seed(setup['seed'])
    np.random.seed(setup['seed'])
    net, config = make_network(setup)
    last, average, steps = train(net, setup, config)
    row = dict(step=steps, cpu_seconds=round(time.process_time(), 1))
    for name, network in dict(last=last, ema=average).items():
        Path(f'{setup["out"]}-{name}.json').write_text(json.dumps(coco_results(network, setup, config)))
    print('\n'+json.dumps(row))


if __name__ == '__main__': main()
