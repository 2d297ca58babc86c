//! The program `qwen2`; all of it is in the library, which the Python wheel calls, too.

fn main() {
    std::process::exit(qwen2_cli::run_program(std::env::args_os()));
}
