from opdengine.config.train import TrainConfig as TrainConfig
from opdengine.training.api import train as train
from opdengine.training.callbacks import Callback as Callback
from opdengine.training.callbacks import Event as Event

__version__: str
