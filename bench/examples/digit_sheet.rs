//! Writes a sheet of drawn digits as a PNG, one row for each class, to look at.
//!
//! `cargo run --release -p afterimage-bench --example digit_sheet -- /tmp/digits.png`

use std::{env, error::Error, fs::File, io::BufWriter};

use afterimage_bench::digits::{CLASSES, draw};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const COLUMNS: usize = 24;
const SIDE: usize = 28;
/// Every pixel becomes a square of this side.
const ZOOM: usize = 2;

fn main() -> Result<(), Box<dyn Error>> {
    let path = env::args().nth(1).unwrap_or("digits.png".into());
    let (width, height) = (COLUMNS * SIDE * ZOOM, usize::from(CLASSES) * SIDE * ZOOM);
    let mut sheet = vec![0u8; width * height];
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for class in 0..CLASSES {
        for column in 0..COLUMNS {
            let image = draw(class, &mut rng);
            for y in 0..SIDE * ZOOM {
                for x in 0..SIDE * ZOOM {
                    let (row, col) = (usize::from(class) * SIDE * ZOOM, column * SIDE * ZOOM);
                    sheet[(row + y) * width + col + x] = image[y / ZOOM * SIDE + x / ZOOM];
                }
            }
        }
    }
    let file = BufWriter::new(File::create(&path)?);
    let mut encoder = png::Encoder::new(file, width as u32, height as u32);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.write_header()?.write_image_data(&sheet)?;
    println!("{path}");
    Ok(())
}
