//! The `afterimage` program. All of it is in the library beside it.

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    afterimage::main()
}
