use super::*;
use crate::pairs;

fn sheet(size: usize) -> Image {
    let faces = SyntheticFaces::new(1, 8, 6, size);
    let mut pictures = Vec::new();
    for person in 0..8 {
        pictures.push(render(&faces.identity(person * 6), &Nuisance::neutral(), size).0);
        pictures.extend((0..6).map(|i| faces.read(person * 6 + i).unwrap()));
    }
    Image::grid(&pictures, 7)
}

#[test]
fn a_sheet_of_faces_is_written() {
    // Kept where FACEPRIOR_SHEET says, to be looked at.
    let folder = tempfile::tempdir().unwrap();
    let path = std::env::var_os("FACEPRIOR_SHEET").map_or(folder.path().join("sheet.png"), Into::into);
    let sheet = sheet(112);
    sheet.write(&path).unwrap();
    assert_eq!(Image::read(&path).unwrap(), sheet);
}
