//! The binary: arguments in, exit code out.

fn main() -> std::process::ExitCode {
    std::process::ExitCode::from(pgflip::cli::main())
}
