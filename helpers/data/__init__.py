"""From named files to batches of tensors. Which class does what, in the order in which data flows:

    before training, called in turn by `prepare.prepare_data`

    DataSettings, DataContext   settings.py            what the run gives: settings, model encoders, processes, reporter
    Scanner                     scanning.py            lists files, reads sizes and captions into the Catalogue, plans the crops
      Catalogue                 catalogue/             every file of every dataset, in SQLite
      ResolutionRule, BucketPlan  plan/                target sizes, crops, and the plan of all images
    PlannedData                 planned.py             the result: datasets, sources, catalogue, plan
    Surveyor                    surveying.py           writes dataset_report.json and the lines on the console (report/)
    EpochOrder, Steps           order/                 which images are in which micro-batch of which step
    LatentEncoder               encode/encoder.py      encodes images: `drain` before training, `start` while it runs
      Walk                      encode/walk.py         which unit of images is next, and which process encodes it
      encode_units              encode/pipeline.py     reads, decodes, encodes and writes units at the same time
        EncodeItem, SharedCodec, RecordWriter          one image on its way; the VAE; its way into caches
      LatentStore, EpochLatents encode/store.py        which latents are cached, and where
      Cache                     cache/                 tensors by key, in sealed shards
    TextStore                   encode/texts.py        encodes captions, and reads their text tensors
    DataFingerprint             fingerprint.py         what must not change for a resumed run to be exact

    while training runs

    TrainingData                training_data.py       the batches of each step, made ahead in a thread
    BatchMaker, Batch           batches.py             rows of the plan to tensors; captions are drawn here
    CachedRecords               training_data.py       what BatchMaker reads: images, crops, latents, text tensors

`base/` has what all of them use, and `ports.py` the types that data asks of a model family and of a reporter.
"""
