"""placeholder"""
def load_ipython_extension(shell): pass
