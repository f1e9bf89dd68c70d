#!/usr/bin/env bash
# Everything that needs a CUDA GPU, on a fresh machine, in less than ten minutes: the tests that are skipped elsewhere,
# throughput, a compiled run, and a seed of the digits and of the PACS table.
#
#   DATA=my/data BACKBONE=my/vit-s14 recipes/gpu_check.sh
#
# It needs no network. The package is used from here; what the machine lacks of its requirements can lie in WHEELS, a
# folder of wheels that are installed beside everything else. DATA is a folder with `pacs` in it and BACKBONE a folder of
# recipes/configs/vit_s14.yaml's; without them, PACS is left out. Results go to OUT, and a line per part says how it went.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu_check} wheels=${WHEELS:-.whl} python=${PYTHON:-python3} work=$(mktemp -d)
mkdir -p "$out"
out=$(realpath "$out")
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export HF_HUB_OFFLINE=1 HF_HOME=$work/hub TOKENIZERS_PARALLELISM=false
if compgen -G "$wheels/*.whl" > /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl || exit
    export PYTHONPATH=$PYTHONPATH:$work/site
fi
"$python" -c "from hf_clpeft.cli import main; main()" env | tee "$out/check.log" || exit

failed=0
part() {  # name, seconds it may take, command
    local name=$1 most=$2 start=$SECONDS status=0
    shift 2
    timeout "$most" "$@" > "$work/$name.log" 2>&1 || status=$?
    {
        echo "== $name: status $status after $((SECONDS - start)) s"
        tail -n 80 "$work/$name.log"
    } | tee -a "$out/check.log"
    failed=$((failed + (status != 0)))
}

part tests 130 "$python" -m pytest --noconftest -p no:cacheprovider --quiet tests/test_cuda.py
part throughput 110 "$python" recipes/throughput.py --model vit_b16 --dtypes bfloat16 --batch_sizes 128 \
    --techniques lora --num_experts 100 1000 --max_peft_experts 0 --warmup 2 --repeats 7 --output_dir "$work/throughput"
part compiled 80 "$python" recipes/s_lora.py --benchmark digits --torch_compile --num_train_epochs 2 \
    --output_dir "$work/compiled"
part digits 100 "$python" recipes/compare.py --config recipes/configs/digits.yaml --seeds 0 --benchmarks digits \
    --num_workers 12 --output_dir "$work/digits" --results "$work/digits.csv"
if [[ -n ${BACKBONE:-} && -d ${DATA:-}/pacs ]]; then
    part pacs 140 "$python" recipes/compare.py --config recipes/configs/main_cpu.yaml --seeds 0 --benchmarks pacs \
        --num_workers 12 --data_root "$DATA" --backbone "$BACKBONE" --output_dir "$work/pacs" --results "$work/pacs.csv"
fi
cp "$work/throughput/throughput.csv" "$work/digits.csv" "$work/pacs.csv" "$out" 2> /dev/null
grep '^==' "$out/check.log"
echo "results: $out"
exit $((failed > 0))
