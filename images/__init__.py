"""Images in, batches of views out.

sets         what --data names: a named set, an array file or a folder
named        Fashion-MNIST, scenes made of it, and CIFAR-10
imagenette   ten classes of ImageNet photographs, decoded once to arrays
shapes       the synthetic images of the demo, drawn here
downloads    fetch a published file once, check it and keep it in a cache
folders      folders of image files: their splits, classes and masks
photos       one image file: header, pixels, and large JPEGs at a reduced scale
arrays       .npz archives and folders of .npy files, checked from their headers
sources      the two kinds of data set: arrays in memory and image files; subsets of either
views        random crop and flip, resized to one or more views (section 2.5)
patches      images as patches x^p and back
augment      colour jitter, RandAugment and random erasing
labelled     views with class labels, for classification (section 2.6)
masked       images with a class for every pixel, for segmentation (section 2.6)
batches      which samples a process gets at each step; pixel ranges and normalisation
convert      python -m images.convert: any data set to arrays that need no decoding

Everything random about a sample depends only on (seed, epoch, index), so the number of loader
processes and of torchrun processes changes no view. Views are uint8 until they are on the device.
"""
