# SPDX-License-Identifier: Apache-2.0
"""Drive pfl: federated averaging of a classifier with central noise, one process.

Runs in pfl's own environment, with the torch of the interpreter that called it.
"""

import argparse
import json
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np


def main() -> None:
    """Read the task, train, write the weights and what each round cost."""
    options = argparse.ArgumentParser()
    options.add_argument("task", type=Path)
    options.add_argument("out", type=Path)
    options.add_argument("--torch", required=True, help="folder of packages that holds torch")
    args = options.parse_args()
    sys.path.append(args.torch)
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    task = dict(np.load(args.task))
    settings = json.loads(str(task["settings"]))
    weights, cpu_s = trained(task, settings)
    np.savez(args.out, weights=weights, cpu_s=np.array(cpu_s))


def trained(task, settings):
    """The weights after all rounds, and the CPU-seconds of this process at the end of each."""
    import torch
    from classifier import module
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByUser
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel
    from pfl.privacy.gaussian_mechanism import GaussianMechanism
    from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism

    class Clock(TrainingProcessCallback):
        """Notes the time after each round."""

        def __init__(self):
            self.ends = []

        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
            self.ends.append(time.process_time())
            return False, Metrics()

    net = module(settings["form"], task["weights"])
    net.loss = lambda images, labels: torch.nn.functional.cross_entropy(net(images), labels)
    net.metrics = lambda images, labels: {"loss": Weighted(0.0, len(labels))}
    images = torch.from_numpy(task["images"]).float().div_(255).unsqueeze(2)
    labels = torch.from_numpy(task["labels"].astype(np.int64))
    cohorts, orders = task["cohorts"], torch.from_numpy(task["orders"])
    rounds, cohort_size = cohorts.shape
    turns = chain.from_iterable(
        ((number, int(user)) for user in cohort) for number, cohort in enumerate(cohorts)
    )
    users = FederatedDataset(
        lambda turn: PyTorchTensorDataset(
            (images[turn[1]][orders[turn[0]]], labels[turn[1]][orders[turn[0]]]),
            user_id=str(turn[1]),
        ),
        lambda: next(turns),
    )
    model = PyTorchModel(
        model=net,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(net.parameters(), lr=settings["server_lr"]),
    )
    noise = GaussianMechanism(settings["clip"], settings["noise_multiplier"])
    clock = Clock()
    backend = SimulatedBackend(
        training_data=users,
        val_data=users,
        postprocessors=[CentrallyAppliedPrivacyMechanism(noise), WeightByUser()][::-1],
    )
    begun = time.process_time()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10 * rounds,  # none but at the start, which cannot be turned off
            train_cohort_size=cohort_size,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=settings["local_epochs"],
            local_learning_rate=settings["local_lr"],
            local_batch_size=settings["local_batch"],
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    flat = torch.nn.utils.parameters_to_vector(net.parameters()).detach().numpy()
    return flat, [begun, *clock.ends]


if __name__ == "__main__":
    main()
