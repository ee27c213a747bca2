// Times llama.cpp's stages as this benchmark's other scripts time theirs, and prints JSON.
//
//   llamacpp-bench quantize IN.gguf OUT.gguf q4_0|q4_k_m|q8_0 THREADS
//   llamacpp-bench text MODEL.gguf EMBEDS.f32 THREADS RUNS STEPS UBATCH LOGITS.f32
//   llamacpp-bench vision MMPROJ.gguf PIXELS.f32 FRAMES SIDE THREADS RUNS FEATURES.f32
//
// Decision: the prefill takes embeddings, the same numbers that every other program's decoder gets, so that
// its logits can be compared; its cost is that of tokens. `text` is a prefill with the logits of the last
// position only, then greedy steps of one token. `vision` encodes one frame after another: the encoder of
// LLaVA takes no batch, and projects all 576 tokens of a frame, since it has no pooling.

#include "clip-impl.h"
#include "clip.h"
#include "llama.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using Clock = std::chrono::steady_clock;

static double since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

[[noreturn]] static void fail(const std::string & what) {
    fprintf(stderr, "llamacpp-bench: %s\n", what.c_str());
    exit(1);
}

static std::vector<float> read_floats(const char * path) {
    FILE * file = fopen(path, "rb");
    if (!file) fail(std::string("cannot open ") + path);
    fseek(file, 0, SEEK_END);
    std::vector<float> data(ftell(file) / sizeof(float));
    rewind(file);
    if (fread(data.data(), sizeof(float), data.size(), file) != data.size()) fail(std::string("cannot read ") + path);
    fclose(file);
    return data;
}

static void write_floats(const char * path, const float * data, size_t count) {
    FILE * file = fopen(path, "wb");
    if (!file || fwrite(data, sizeof(float), count, file) != count) fail(std::string("cannot write ") + path);
    fclose(file);
}

static void print_list(const char * name, const std::vector<double> & values) {
    printf("\"%s\": [", name);
    for (size_t i = 0; i < values.size(); i++) printf("%s%.6f", i ? ", " : "", values[i]);
    printf("]");
}

static int quantize(char ** args) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    const std::string type = args[2];
    if (type == "q4_0") params.ftype = LLAMA_FTYPE_MOSTLY_Q4_0;
    else if (type == "q4_k_m") params.ftype = LLAMA_FTYPE_MOSTLY_Q4_K_M;
    else if (type == "q8_0") params.ftype = LLAMA_FTYPE_MOSTLY_Q8_0;
    else fail("unknown type " + type);
    params.nthread = atoi(args[3]);
    params.allow_requantize = true;
    return llama_model_quantize(args[0], args[1], &params) == 0 ? 0 : 1;
}

static int text(char ** args) {
    const int threads = atoi(args[2]), runs = atoi(args[3]), steps = atoi(args[4]), ubatch = atoi(args[5]);
    std::vector<float> embeds = read_floats(args[1]);
    const auto load_start = Clock::now();
    llama_model * model = llama_model_load_from_file(args[0], llama_model_default_params());
    if (!model) fail(std::string("cannot load ") + args[0]);
    const int hidden = llama_model_n_embd(model);
    const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const int tokens = int(embeds.size() / hidden);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = tokens + steps + 8;
    params.n_batch = tokens;
    params.n_ubatch = ubatch;
    params.n_threads = threads;
    params.n_threads_batch = threads;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) fail("cannot make a context");
    const double load_s = since(load_start);

    llama_batch prompt = llama_batch_init(tokens, hidden, 1);
    prompt.n_tokens = tokens;
    memcpy(prompt.embd, embeds.data(), embeds.size() * sizeof(float));
    for (int i = 0; i < tokens; i++) {
        prompt.pos[i] = i;
        prompt.n_seq_id[i] = 1;
        prompt.seq_id[i][0] = 0;
        prompt.logits[i] = i == tokens - 1;
    }
    std::vector<double> prefill_s, decode_s;
    std::vector<llama_token> generated;
    // The first run warms up and does not count.
    for (int run = 0; run <= runs; run++) {
        llama_memory_clear(llama_get_memory(context), true);
        generated.clear();
        auto start = Clock::now();
        if (llama_decode(context, prompt)) fail("the prefill failed");
        const float * logits = llama_get_logits_ith(context, tokens - 1);
        double seconds = since(start);
        if (run > 0) prefill_s.push_back(seconds);
        if (run == 0) write_floats(args[6], logits, vocab);
        for (int step = 0; step < steps; step++) {
            llama_token best = 0;
            for (int i = 1; i < vocab; i++) {
                if (logits[i] > logits[best]) best = i;
            }
            generated.push_back(best);
            start = Clock::now();
            if (llama_decode(context, llama_batch_get_one(&best, 1))) fail("a step failed");
            logits = llama_get_logits_ith(context, 0);
            seconds = since(start);
            if (run > 0) decode_s.push_back(seconds);
        }
    }
    printf("{\"load_s\": %.6f, \"prefill_tokens\": %d, ", load_s, tokens);
    print_list("prefill_s", prefill_s);
    printf(", ");
    print_list("decode_s", decode_s);
    printf(", \"greedy\": [");
    for (size_t i = 0; i < generated.size(); i++) printf("%s%d", i ? ", " : "", generated[i]);
    printf("]}\n");
    llama_batch_free(prompt);
    llama_free(context);
    llama_model_free(model);
    return 0;
}

static int vision(char ** args) {
    const int frames = atoi(args[2]), side = atoi(args[3]), threads = atoi(args[4]), runs = atoi(args[5]);
    const size_t area = size_t(side) * side;
    std::vector<float> pixels = read_floats(args[1]);
    if (pixels.size() < frames * 3 * area) fail("too few pixels");
    clip_context_params params = {};
    params.flash_attn_type = CLIP_FLASH_ATTN_TYPE_AUTO;
    params.image_min_tokens = -1;
    params.image_max_tokens = -1;
    params.warmup = true;
    const auto load_start = Clock::now();
    clip_ctx * context = clip_init(args[0], params).ctx_v;
    if (!context) fail(std::string("cannot load ") + args[0]);
    const double load_s = since(load_start);
    std::vector<clip_image_f32> images(frames);
    for (int f = 0; f < frames; f++) {
        // It takes rows of RGB triples.
        std::vector<float> image(3 * area);
        for (size_t channel = 0; channel < 3; channel++) {
            for (size_t i = 0; i < area; i++) image[3 * i + channel] = pixels[(3 * f + channel) * area + i];
        }
        images[f].set_size({side, side}, false, false);
        images[f].cpy_buf(image);
    }
    std::vector<double> vision_s;
    std::vector<float> features;
    for (int run = 0; run <= runs; run++) {
        const auto start = Clock::now();
        for (int f = 0; f < frames; f++) {
            std::vector<float> out(size_t(clip_n_output_tokens(context, &images[f])) * clip_n_mmproj_embd(context));
            if (!clip_image_encode(context, threads, &images[f], out)) fail("encoding failed");
            if (f == 0 && run == 0) features = out;
        }
        if (run > 0) vision_s.push_back(since(start));
    }
    write_floats(args[6], features.data(), features.size());
    printf("{\"load_s\": %.6f, \"vision_frames\": %d, ", load_s, frames);
    print_list("vision_s", vision_s);
    printf("}\n");
    clip_free(context);
    return 0;
}

int main(int argc, char ** argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    // What it says about loading goes to stderr; errors only, to keep that short.
    const auto errors = [](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
    };
    llama_log_set(errors, nullptr);
    mtmd_log_set(errors, nullptr);
    llama_backend_init();
    if (mode == "quantize" && argc == 6) return quantize(argv + 2);
    if (mode == "text" && argc == 9) return text(argv + 2);
    if (mode == "vision" && argc == 9) return vision(argv + 2);
    fail("usage: quantize IN OUT TYPE THREADS | text MODEL EMBEDS THREADS RUNS STEPS UBATCH LOGITS | "
         "vision MMPROJ PIXELS FRAMES SIDE THREADS RUNS FEATURES");
}
