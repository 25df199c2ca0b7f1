"""What is predicted, by which rows, and what the losses of a global batch are divided by."""

from faults.checks import EXPERT, FSDP
from faults.fault import Fault

FILE, STEP, LOADER = "accessory/parallel/cross_entropy.py", "accessory/train/step.py", "accessory/data/loader.py"
DEFINITION = "tests/test_kernels.py::test_cross_entropy_equals_the_definition"
LIES = "tests/test_packing.py::test_a_batch_says_where_its_documents_lie"
LOG_PROBS = "tests/test_log_probs.py"
PREDICTED = "'tests/test_log_probs.py::test_a_model_can_be_trained_by_them[2]'"
MASKED = "certify --only world=1 masks=yes accum=3"

FAULTS = (
    Fault(
        "every chunk of rows has the first one's targets",
        FILE,
        "local = targets[rows] - start",
        "local = targets[: rows.stop - rows.start] - start",
        DEFINITION,
    ),
    Fault(
        "the output layer's gradient is that of the last chunk",
        FILE,
        "d_w.addmm_(d_logits.T, x[rows])",
        "torch.mm(d_logits.T, x[rows], out=d_w)",
        DEFINITION,
    ),
    Fault(
        "parts of the vocabulary have the logits of the first",
        FILE,
        "torch.mm(hidden[rows], w.T, out=part)",
        "torch.mm(hidden[rows], weight[: len(w)].T, out=part)",
        "tests/test_kernels.py::test_cross_entropy_in_many_chunks",
    ),
    Fault(
        "every rank's part of the vocabulary begins at 0",
        FILE,
        "mp.rank * len(weight)",
        "0",
        EXPERT,
    ),
    Fault(
        "each rank takes its own largest logit",
        FILE,
        "largest = mp.all_reduce(self.logits.amax(1), ReduceOp.MAX)",
        "largest = self.logits.amax(1)",
        EXPERT,
    ),
    Fault(
        "a target of another rank's is subtracted here too",
        FILE,
        "scatter_add_(1, self.column, -self.mine.unsqueeze(1))",
        "scatter_add_(1, self.column, -torch.ones_like(self.mine).unsqueeze(1))",
        EXPERT,
    ),
    Fault(
        "the gradient does not see what the loss was multiplied by",
        FILE,
        "None if g is None else g.mul_(grad)",
        "None if g is None else g",
        DEFINITION,
    ),
    Fault(
        "the likeliest token is counted from each rank's first",
        FILE,
        "column + mp.rank * width",
        "column + 0 * width",
        PREDICTED,
    ),
    Fault(
        "a rank names its own likeliest token whatever the others have",
        FILE,
        "masked_fill(is_less, ",
        "masked_fill(is_less & False, ",
        PREDICTED,
    ),
    Fault(
        "log-probabilities: the softmax of backward has its own rank's sum",
        FILE,
        "target_logit, log_sums[chunk.rows], _ = chunk.statistics(mp)\n            log_probs[chunk.rows] = target_logit - "
        "log_sums[chunk.rows]",
        "own = chunk.logits.logsumexp(1)\n            target_logit, log_sum, _ = chunk.statistics(mp)\n"
        "            log_probs[chunk.rows], log_sums[chunk.rows] = target_logit - log_sum, own",
        f"{LOG_PROBS}::test_they_are_torchs_own[2]",
    ),
    Fault(
        "log-probabilities: every chunk is weighed like the first",
        FILE,
        "mul_(-grad[chunk.rows].unsqueeze(1))",
        "mul_(-grad[: len(chunk.logits)].unsqueeze(1))",
        f"{LOG_PROBS}::test_they_are_torchs_own[1]",
    ),
    Fault(
        "log-probabilities: the gradient has the sign of the cross-entropy's",
        FILE,
        "mul_(-grad[chunk.rows].unsqueeze(1))",
        "mul_(grad[chunk.rows].unsqueeze(1))",
        f"{LOG_PROBS}::test_a_model_can_be_trained_by_them[1]",
    ),
    Fault(
        "every chunk has the first one's rows of the adapter",
        FILE,
        "product.addmm_(x[rows], w.T)",
        "product.addmm_(x[: len(product)], w.T)",
        f"{LOG_PROBS}::test_they_are_torchs_own[1]",
    ),
    Fault(
        "a token is predicted from itself",
        LOADER,
        "torch.from_numpy(places - 1)",
        "torch.from_numpy(places)",
        LIES,
    ),
    Fault(
        "a document's first token is predicted from the document before",
        LOADER,
        "(documents.positions.numpy() > 0)).nonzero()",
        "(np.arange(len(ids)) > 0)).nonzero()",
        LIES,
    ),
    Fault(
        "prompts are trained on",
        LOADER,
        "np.asarray(sample.trained, bool)",
        "np.ones(len(sample.tokens), bool)",
        MASKED,
    ),
    Fault(
        "the token of a rank without documents counts among the tokens",
        LOADER,
        "len(ids) if samples else 0",
        "len(ids)",
        "tests/test_data.py::test_a_batch_holds_what_its_samples_say",
    ),
    Fault(
        "the loss is a mean of the micro-batches' means",
        STEP,
        "(loss_sum / targets.clamp(min=1) + balance_weight",
        "(loss_sum / max(1, batch.target_tokens) / len(micro_batches) / dp.size + balance_weight",
        MASKED,
    ),
    Fault(
        "each rank divides by its own targets",
        STEP,
        "targets, tokens = dp.all_reduce(totals)",
        "targets, tokens = totals * dp.size",
        FSDP,
    ),
    Fault(
        "the third and later micro-batches count half",
        STEP,
        "z_weight * z).backward()",
        "z_weight * z).div(2 if index > 1 else 1).backward()",
        "certify --only world=1 accum=3 tuning=full",
    ),
    Fault(
        "the loss that is told is the last micro-batch's",
        STEP,
        "    loss_sum, balance, z, counts, entropy, of_images, measures = (",
        "    _, balance, z, counts, entropy, of_images, measures = (",
        "certify --only world=1 accum=3 tuning=full",
    ),
    Fault(
        "the validation loss is a mean of the batches' means",
        "accessory/train/validate.py",
        "targets += objective.targets(batch)\n        loss_sums.append(found.loss_sum.double())",
        "targets += 1\n        loss_sums.append(found.loss_sum.double() / max(1, batch.target_tokens))",
        "tests/test_validate.py::test_the_validation_loss",
    ),
    Fault(
        "the logged balance loss is a sum over steps",
        "accessory/train/metrics.py",
        '"balance": balance / len(steps),',
        '"balance": balance,',
        "tests/test_health.py::test_figures_equal_one_plain_process[1]",
    ),
    Fault(
        "LLaMA2-Accessory's mean of means is taken over targets",
        "accessory/train/objective.py",
        "        return 1\n",
        "        return self.objective.targets(batch)\n",
        "tests/test_balance.py::test_the_references_numbers_on_request",
    ),
    Fault(
        "the logged loss is divided by the last step's targets",
        "accessory/train/metrics.py",
        "targets = int(sum(s.targets for s in steps))",
        "targets = int(last.targets) * len(steps)",
        "tests/test_health.py::test_figures_equal_one_plain_process[1]",
    ),
)
