"""Statistics over LoRA seeds: what of a ranking is more than luck. (docs/method.md section 7)"""
