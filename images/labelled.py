"""Views with class labels for classification (section 2.6)."""

from images import augment, views
from plumbing import noise


class LabelledViews(views.Crops):
    """A batch of keys (epoch, index) gives uint8 images (B, 3, S, S) and int64 labels (B,).

    Training: random crop and flip, then RandAugment and random erasing. Evaluation: the centred
    square, or the whole image from 384 pixels on. args: the flags of finetune_cls. Raises
    ValueError if the source has no labels or a label is not below `classes`.
    """

    def __init__(self, args, source, classes, train):
        if source.labels is None:
            raise ValueError(f"{source.name}: it has no class labels")
        largest = source.labels.max()
        if largest >= classes:
            raise ValueError(
                f"{source.name}: label {largest} is out of range for {classes} classes"
            )
        super().__init__(
            source,
            [(args.image_size, "bicubic")],
            train,
            args.seed,
            args.min_crop,
            args.flip,
            centre=1.0 if args.image_size >= 384 else args.eval_crop,
            labels=True,
        )
        self.randaugment, self.erasing = args.randaugment, args.erasing

    def __getitems__(self, keys):
        images, labels = super().__getitems__(keys)
        if self.train and (self.randaugment or self.erasing):
            for index, key in enumerate(keys):
                rng = noise.sample_rng(self.seed, *key, "augment")
                if self.randaugment:
                    images[index] = augment.randaugment(images[index], self.randaugment, rng)
                if rng.random() < self.erasing:
                    augment.erase(images[index], rng)
        return [images, labels]
