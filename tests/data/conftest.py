from hypothesis import settings

settings.register_profile("busy machine", deadline=None)  # other tests may hold the cores
settings.load_profile("busy machine")
