//! A fold over a file, with the library alone:
//! `cargo run --release -p afterimage-streams --example fold mean lines numbers.txt [FIELD]`.

use std::error::Error;
use std::io::Read;
use std::time::{Duration, Instant};

use afterimage_streams::run::{OnBad, Plan, Run};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let mut next = || args.next().ok_or("usage: fold FOLD FORMAT FILE [FIELD]");
    let (fold, format, file) = (next()?, next()?, next()?);
    let plan = Plan { fold, format, field: next().ok(), limit: 1 << 20 };
    let mut run = Run::new(plan, OnBad::Stop)?;
    let (mut file, mut buffer) = (std::fs::File::open(file)?, vec![0; 256 << 10]);
    let begun = Instant::now();
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        run.push(&buffer[..read])?;
    }
    run.finish()?;
    println!("{}", serde_json::to_string(&run.report(begun.elapsed(), Duration::ZERO))?);
    Ok(())
}
