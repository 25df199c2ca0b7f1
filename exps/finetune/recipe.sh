# The common part of all recipes; a requeued job resumes. They source it:  . recipe.sh RUN_YAML [key.sub=value ...] -- "$@"
# where "$@" = CKPT_DIR CONFIG_JSON TOKENIZER [key.sub=value ...]
set -euo pipefail
settings=()
while [ "$1" != -- ]; do settings+=("$1"); shift; done
shift
if [ $# -lt 3 ]; then
    echo "usage: bash $0 CKPT_DIR CONFIG_JSON TOKENIZER [key.sub=value ...]" >&2
    exit 1
fi
checkpoint=$(realpath "$1") config=$(realpath "$2") tokenizer=$(realpath "$3")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec python -m accessory finetune "configs/finetune/${settings[0]}.yaml" "${settings[@]:1}" \
    resume=auto model.checkpoint="$checkpoint" model.config="$config" model.tokenizer="$tokenizer" "${@:4}"
