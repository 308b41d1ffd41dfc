def reflects(text): return 'wait' in text or '等等' in text
