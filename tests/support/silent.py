"""An observer that hears everything and says nothing."""


class Silent:
    def on_step(self, step):
        pass

    def on_epoch(self, epoch):
        pass

    def on_event(self, event, values):
        pass

    def must_stop(self):
        return None
