"""The tiny world: scenes, captions, codec, detectors, clips, scores and ablations."""
