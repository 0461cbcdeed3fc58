def report(found, options): return ""
def draw(found, options): pass
