//! One property over all decoders: whatever the bytes, an answer or an error, never a panic.

use proptest::prelude::*;

use crate::image::Image;

fn valid_files() -> Vec<Vec<u8>> {
    let mut png = Vec::new();
    let mut encoder = ::png::Encoder::new(&mut png, 5, 3);
    encoder.set_color(::png::ColorType::Rgb);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&[77; 45]).unwrap();
    writer.finish().unwrap();
    vec![
        png,
        b"P5 2 2 255\n1234".to_vec(),
        b"P2 2 2 9\n1 2 3 4\n".to_vec(),
        vec![0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 2, 3, 4],
    ]
}

#[test]
fn the_files_that_are_mutated_below_are_valid() {
    for file in valid_files() {
        Image::decode(&file).unwrap();
    }
}

proptest! {
    #[test]
    fn no_mutation_of_a_valid_file_panics(
        which in 0..4_usize,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut file = valid_files().swap_remove(which);
        for (at, byte) in edits {
            let at = at.index(file.len());
            file[at] = byte;
        }
        let _ = Image::decode(&file);
        file.truncate(cut.index(file.len()));
        let _ = Image::decode(&file);
    }
}
