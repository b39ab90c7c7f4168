//! JPEG decoding, bit for bit as libjpeg-turbo does it with its defaults (and Pillow, OpenCV and torchvision through it).
//!
//! The JPEG standard leaves the inverse transform's rounding and the upsampling of colour open, and decoders differ by a
//! few levels of 255. MTCNN amplifies that: landmarks of small faces move by pixels. Crops, embeddings and scores are
//! compared with those of systems that read through libjpeg-turbo, hence this decoder: the accurate integer transform of
//! `jidctint.c`, the triangle ("fancy") upsampling of `jdsample.c` and the 16-bit fixed-point colours of `jdcolor.c`.
//!
//! Baseline and progressive Huffman JPEG of 8 bits with one or three components and colour of half or full resolution,
//! which is to say nearly every photograph. Anything else, and any file that is broken, is left to the general decoder
//! in [`crate::image`], whose errors name what is wrong.

use std::cell::{OnceCell, RefCell};
use std::rc::Rc;

use ::image::metadata::Orientation;

use crate::{DecodeLimits, Image};

/// Why there is no picture.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Fewer data than the frame has blocks: a truncated file, or damage that comes to the same.
    EndsEarly,
    /// A kind of JPEG, a size or damage that the general decoder has to judge.
    NotCovered,
}

/// Decodes a JPEG as it is stored, with the orientation that its EXIF data ask for.
pub(crate) fn decode(bytes: &[u8], limits: DecodeLimits) -> Result<(Image, Orientation), Refusal> {
    let mut decoder = Decoder {
        data: bytes,
        at: 0,
        ..Decoder::default()
    };
    match decoder.read(limits).and_then(|()| decoder.finish()) {
        Some(image) => {
            let orientation = decoder.exif.and_then(Orientation::from_exif_chunk);
            Ok((image, orientation.unwrap_or(Orientation::NoTransforms)))
        }
        None if decoder.ends_early => Err(Refusal::EndsEarly),
        None => Err(Refusal::NotCovered),
    }
}

/// Most scans of a file. A scan of a progressive picture can be a few bytes for any number of blocks; encoders write
/// about ten.
const MAX_SCANS: usize = 100;

/// Place of the k-th coefficient of the file in the 8×8 block; the tail catches what leads out of it.
const ZIGZAG: [u8; 64 + 256] = {
    let places = [
        0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
        6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38,
        31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
    ];
    let mut all = [63; 64 + 256];
    let mut k = 0;
    while k < 64 {
        all[k] = places[k];
        k += 1;
    }
    all
};

type Block = [i16; 64];

#[derive(Default)]
struct Decoder<'a> {
    data: &'a [u8],
    at: usize,
    width: usize,
    height: usize,
    progressive: bool,
    components: Vec<Component>,
    /// Largest sampling factors.
    h_max: usize,
    v_max: usize,
    quantisers: [Option<[u16; 64]>; 4],
    dc_tables: [Option<Rc<Huffman>>; 4],
    ac_tables: [Option<Rc<Huffman>>; 4],
    restart_interval: usize,
    jfif: bool,
    adobe_transform: Option<u8>,
    /// The last EXIF segment, from its TIFF header on.
    exif: Option<&'a [u8]>,
    scans: usize,
    complete: bool,
    ends_early: bool,
}

#[derive(Default)]
struct Component {
    id: u8,
    h: usize,
    v: usize,
    quantiser: usize,
    /// Size in samples: what the picture's size comes to at this sampling.
    width: usize,
    height: usize,
    /// Blocks in a row and in a column, filled up to whole minimum coded units.
    blocks_wide: usize,
    blocks_high: usize,
    /// `[blocks_high·8, blocks_wide·8]`.
    samples: Vec<u8>,
    /// Progressive only.
    coefficients: Vec<Block>,
    waiting: Waiting,
    dc_predictor: i32,
    /// Whether a scan brought its DC coefficients.
    seen: bool,
}

/// Blocks are transformed in pairs: the first waits here for the second.
struct Waiting {
    blocks: [Block; 2],
    /// Where the samples of the first go; none while nothing waits.
    first: Option<usize>,
}

impl Default for Waiting {
    fn default() -> Self {
        Self {
            blocks: [[0; 64]; 2],
            first: None,
        }
    }
}

impl Waiting {
    /// The block that is to be filled next; all zeros.
    #[inline(always)]
    fn free(&mut self) -> &mut Block {
        &mut self.blocks[usize::from(self.first.is_some())]
    }
}

/// A component in a scan.
struct ScanComponent {
    index: usize,
    dc_table: usize,
    ac_table: usize,
}

struct Scan {
    components: Vec<ScanComponent>,
    start: usize,
    end: usize,
    high: u32,
    low: u32,
}

impl<'a> Decoder<'a> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.data.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// The next segment's body.
    fn segment(&mut self) -> Option<std::ops::Range<usize>> {
        let length = usize::from(u16::from_be_bytes([self.byte()?, self.byte()?]));
        let body = self.at..self.at + length.checked_sub(2)?;
        self.data.get(body.clone())?;
        self.at = body.end;
        Some(body)
    }

    fn marker(&mut self) -> Option<u8> {
        loop {
            while self.byte()? != 0xFF {}
            let mut code = self.byte()?;
            while code == 0xFF {
                code = self.byte()?;
            }
            if code != 0 {
                return Some(code);
            }
        }
    }

    /// Reads markers and scans up to the end of the picture.
    fn read(&mut self, limits: DecodeLimits) -> Option<()> {
        if self.data.get(..2)? != [0xFF, 0xD8] {
            return None;
        }
        self.at = 2;
        loop {
            match self.marker()? {
                0xD9 => {
                    self.complete = true;
                    return Some(());
                }
                code @ (0xC0..=0xC2) => {
                    self.progressive = code == 0xC2;
                    let body = self.segment()?;
                    self.frame(body, limits)?;
                }
                0xC4 => {
                    let body = self.segment()?;
                    self.huffman_tables(body)?;
                }
                // Lossless, hierarchical or arithmetic coding; a height that is told later.
                0xC3 | 0xC5..=0xCF | 0xDC => return None,
                0xDB => {
                    let body = self.segment()?;
                    self.quantisation_tables(body)?;
                }
                0xDD => {
                    let body = self.segment()?;
                    let body = self.data.get(body)?;
                    self.restart_interval = usize::from(u16::from_be_bytes([*body.first()?, *body.get(1)?]));
                }
                0xDA => {
                    let body = self.segment()?;
                    self.scan(body)?;
                }
                code @ 0xE0..=0xEF => {
                    let body = self.segment()?;
                    self.application(code, body)?;
                }
                0x01 | 0xD0..=0xD8 => {}
                _ => {
                    self.segment()?;
                }
            }
        }
    }

    fn application(&mut self, code: u8, body: std::ops::Range<usize>) -> Option<()> {
        let data: &'a [u8] = self.data;
        let body = data.get(body)?;
        match code {
            0xE0 if body.len() >= 14 && body.starts_with(b"JFIF\0") => self.jfif = true,
            0xE1 if body.starts_with(b"Exif\0\0") => self.exif = Some(&body[6..]),
            0xEE if body.len() >= 12 && body.starts_with(b"Adobe") => self.adobe_transform = Some(body[11]),
            _ => {}
        }
        Some(())
    }

    fn frame(&mut self, body: std::ops::Range<usize>, limits: DecodeLimits) -> Option<()> {
        let &[8, h1, h0, w1, w0, count, ref rest @ ..] = self.data.get(body)? else {
            return None;
        };
        (self.height, self.width) = (
            usize::from(u16::from_be_bytes([h1, h0])),
            usize::from(u16::from_be_bytes([w1, w0])),
        );
        let fits = self.width * self.height <= limits.max_pixels && self.width * self.height > 0;
        if !fits || !self.components.is_empty() || !(count == 1 || count == 3) {
            return None;
        }
        for part in rest.chunks_exact(3).take(usize::from(count)) {
            let &[id, sampling, quantiser] = part else {
                return None;
            };
            let (h, v) = (usize::from(sampling >> 4), usize::from(sampling & 15));
            if quantiser > 3 || !(1..=2).contains(&h) || !(1..=2).contains(&v) {
                return None;
            }
            let quantiser = usize::from(quantiser);
            self.components.push(Component {
                id,
                h,
                v,
                quantiser,
                ..Component::default()
            });
        }
        if self.components.len() != usize::from(count) {
            return None;
        }
        if let [single] = self.components.as_mut_slice() {
            // With one component, its sampling factors mean nothing.
            (single.h, single.v) = (1, 1);
        }
        self.h_max = self.components.iter().map(|component| component.h).max()?;
        self.v_max = self.components.iter().map(|component| component.v).max()?;
        // First component at full resolution, the others alike: what the upsampling below covers.
        let [first, others @ ..] = self.components.as_slice() else {
            return None;
        };
        let alike = others
            .iter()
            .all(|other| (other.h, other.v) == (others[0].h, others[0].v));
        if (first.h, first.v) != (self.h_max, self.v_max) || !alike {
            return None;
        }
        let units_wide = self.width.div_ceil(8 * self.h_max);
        let units_high = self.height.div_ceil(8 * self.v_max);
        let blocks = self.components.iter().map(|component| component.h * component.v);
        let blocks = blocks.sum::<usize>() * units_wide * units_high;
        // Nothing is allocated for what the file cannot hold: every block takes a bit at least.
        if blocks > 8 * self.data.len() {
            self.ends_early = true;
            return None;
        }
        for component in &mut self.components {
            component.width = (self.width * component.h).div_ceil(self.h_max);
            component.height = (self.height * component.v).div_ceil(self.v_max);
            component.blocks_wide = units_wide * component.h;
            component.blocks_high = units_high * component.v;
            let blocks = component.blocks_wide * component.blocks_high;
            component.samples = vec![0; blocks * 64];
            if self.progressive {
                component.coefficients = vec![[0; 64]; blocks];
            }
        }
        Some(())
    }

    fn quantisation_tables(&mut self, body: std::ops::Range<usize>) -> Option<()> {
        let mut body = self.data.get(body)?;
        while let Some((&kind, rest)) = body.split_first() {
            let wide = kind >> 4 != 0;
            let (values, rest) = rest.split_at_checked(if wide { 128 } else { 64 })?;
            let table = self.quantisers.get_mut(usize::from(kind & 15))?.insert([0; 64]);
            for (k, &place) in ZIGZAG[..64].iter().enumerate() {
                table[usize::from(place)] = if wide {
                    u16::from_be_bytes([values[2 * k], values[2 * k + 1]])
                } else {
                    u16::from(values[k])
                };
            }
            body = rest;
        }
        Some(())
    }

    fn huffman_tables(&mut self, body: std::ops::Range<usize>) -> Option<()> {
        let mut body = self.data.get(body)?;
        while let Some((&kind, rest)) = body.split_first() {
            let (counts, rest) = rest.split_at_checked(16)?;
            let total: usize = counts.iter().map(|&count| usize::from(count)).sum();
            let (symbols, rest) = rest.split_at_checked(total)?;
            let (class, tables) = if kind >> 4 == 0 {
                (0, &mut self.dc_tables)
            } else {
                (1, &mut self.ac_tables)
            };
            let number = usize::from(kind & 15);
            *tables.get_mut(number)? = Some(Huffman::of(class, number, counts, symbols)?);
            body = rest;
        }
        Some(())
    }

    fn scan(&mut self, body: std::ops::Range<usize>) -> Option<()> {
        self.scans += 1;
        if self.scans > MAX_SCANS {
            return None;
        }
        let (&count, rest) = self.data.get(body)?.split_first()?;
        let (parts, rest) = rest.split_at_checked(2 * usize::from(count))?;
        let &[start, end, approximation, ..] = rest else {
            return None;
        };
        let mut components = Vec::new();
        for part in parts.chunks_exact(2) {
            let index = self
                .components
                .iter()
                .position(|component| component.id == part[0])?;
            if components
                .iter()
                .any(|other: &ScanComponent| other.index == index)
            {
                return None;
            }
            let (dc_table, ac_table) = (usize::from(part[1] >> 4), usize::from(part[1] & 15));
            if dc_table > 3 || ac_table > 3 {
                return None;
            }
            components.push(ScanComponent {
                index,
                dc_table,
                ac_table,
            });
        }
        let scan = Scan {
            components,
            start: usize::from(start),
            end: usize::from(end),
            high: u32::from(approximation >> 4),
            low: u32::from(approximation & 15),
        };
        if scan.components.is_empty() || scan.end > 63 || scan.low > 13 {
            return None;
        }
        if self.progressive {
            let dc = scan.start == 0 && scan.end == 0;
            let ac = scan.start > 0 && scan.end >= scan.start && scan.components.len() == 1;
            if !(dc || ac) {
                return None;
            }
        }
        // Tables that are needed are taken out for the time of the scan, so that decoding can change the rest.
        let (dc_tables, ac_tables) = (
            std::mem::take(&mut self.dc_tables),
            std::mem::take(&mut self.ac_tables),
        );
        let mut bits = Bits::new(self.data, self.at);
        let result = self.entropy_coded(&scan, &dc_tables, &ac_tables, &mut bits);
        (self.dc_tables, self.ac_tables) = (dc_tables, ac_tables);
        self.ends_early = bits.overran();
        self.at = bits.position();
        result.filter(|()| !self.ends_early)
    }

    /// Reads the units of a scan; compiled a second time for processors whose shifts take any register.
    fn entropy_coded(
        &mut self,
        scan: &Scan,
        dc_tables: &[Option<Rc<Huffman>>; 4],
        ac_tables: &[Option<Rc<Huffman>>; 4],
        bits: &mut Bits,
    ) -> Option<()> {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,bmi1,bmi2")]
            fn wide(
                decoder: &mut Decoder,
                scan: &Scan,
                dc_tables: &[Option<Rc<Huffman>>; 4],
                ac_tables: &[Option<Rc<Huffman>>; 4],
                bits: &mut Bits,
            ) -> Option<()> {
                decoder.units(scan, dc_tables, ac_tables, bits)
            }
            if std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("bmi1")
                && std::arch::is_x86_feature_detected!("bmi2")
            {
                // SAFETY: the machine has the instructions, as just asked; the function itself is safe code.
                return unsafe { wide(self, scan, dc_tables, ac_tables, bits) };
            }
        }
        self.units(scan, dc_tables, ac_tables, bits)
    }

    #[inline(always)]
    fn units(
        &mut self,
        scan: &Scan,
        dc_tables: &[Option<Rc<Huffman>>; 4],
        ac_tables: &[Option<Rc<Huffman>>; 4],
        bits: &mut Bits,
    ) -> Option<()> {
        let mut end_of_band = 0;
        // A scan of one component has one block in a unit, and none of the filled-up ones.
        let alone = scan.components.len() == 1;
        let (units_wide, units_high) = if alone {
            let component = &self.components[scan.components[0].index];
            (component.width.div_ceil(8), component.height.div_ceil(8))
        } else {
            (
                self.width.div_ceil(8 * self.h_max),
                self.height.div_ceil(8 * self.v_max),
            )
        };
        let mut until_restart = self.restart_interval;
        self.components
            .iter_mut()
            .for_each(|component| component.dc_predictor = 0);
        for unit_y in 0..units_high {
            if bits.overran() {
                return None;
            }
            for unit_x in 0..units_wide {
                if self.restart_interval > 0 && until_restart == 0 {
                    bits.restart()?;
                    end_of_band = 0;
                    until_restart = self.restart_interval;
                    self.components
                        .iter_mut()
                        .for_each(|component| component.dc_predictor = 0);
                }
                until_restart = until_restart.wrapping_sub(1);
                for part in &scan.components {
                    let component = &mut self.components[part.index];
                    let (h, v) = if alone { (1, 1) } else { (component.h, component.v) };
                    let dc = dc_tables[part.dc_table].as_deref();
                    let ac = ac_tables[part.ac_table].as_deref();
                    let places = (unit_y * v..(unit_y + 1) * v)
                        .flat_map(|y| (unit_x * h..(unit_x + 1) * h).map(move |x| (x, y)));
                    for (x, y) in places {
                        if self.progressive {
                            let block = &mut component.coefficients[y * component.blocks_wide + x];
                            match (scan.start, scan.high) {
                                (0, 0) => {
                                    component.dc_predictor =
                                        component.dc_predictor.wrapping_add(bits.difference(dc?)?);
                                    block[0] = (component.dc_predictor << scan.low) as i16;
                                }
                                (0, _) => block[0] |= (bits.take(1) << scan.low) as i16,
                                (_, 0) => bits.first_band(ac?, scan, block, &mut end_of_band)?,
                                _ => bits.refine_band(ac?, scan, block, &mut end_of_band)?,
                            }
                        } else {
                            let quantiser = self.quantisers[component.quantiser].as_ref()?;
                            component.dc_predictor =
                                component.dc_predictor.wrapping_add(bits.difference(dc?)?);
                            let block = component.waiting.free();
                            block[0] = component.dc_predictor as i16;
                            let any = bits.coefficients(ac?, block)?;
                            component.put(x, y, quantiser, any);
                        }
                    }
                    component.seen |= scan.start == 0;
                }
            }
        }
        if !self.progressive {
            for part in &scan.components {
                let component = &mut self.components[part.index];
                component.flush(self.quantisers[component.quantiser].as_ref()?);
            }
        }
        Some(())
    }

    /// Transforms what a progressive picture has gathered, then joins the components to colours.
    fn finish(&mut self) -> Option<Image> {
        if !self.complete
            || self.components.is_empty()
            || !self.components.iter().all(|component| component.seen)
        {
            return None;
        }
        if self.progressive {
            for component in &mut self.components {
                let quantiser = self.quantisers[component.quantiser].as_ref()?;
                let coefficients = std::mem::take(&mut component.coefficients);
                for (i, &block) in coefficients.iter().enumerate() {
                    let (x, y) = (i % component.blocks_wide, i / component.blocks_wide);
                    *component.waiting.free() = block;
                    component.put(x, y, quantiser, true);
                }
                component.flush(quantiser);
            }
        }
        let mut pixels = vec![0; self.width * self.height * 3];
        self.join(&mut pixels)?;
        Some(Image::new(self.width, self.height, pixels))
    }

    /// Joins the components to pixels; for processors with AVX2 the loops are compiled a second time.
    fn join(&self, pixels: &mut [u8]) -> Option<()> {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2")]
            fn wide(decoder: &Decoder, pixels: &mut [u8]) -> Option<()> {
                decoder.join_rows(pixels)
            }
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: the machine has AVX2, as just asked; the function itself is safe code.
                return unsafe { wide(self, pixels) };
            }
        }
        self.join_rows(pixels)
    }

    #[inline(always)]
    fn join_rows(&self, pixels: &mut [u8]) -> Option<()> {
        let rows = pixels
            .as_chunks_mut::<3>()
            .0
            .chunks_exact_mut(self.width)
            .enumerate();
        match self.components.as_slice() {
            [grey] => {
                for (y, row) in rows {
                    for (pixel, &value) in row.iter_mut().zip(grey.row(y)) {
                        *pixel = [value; 3];
                    }
                }
            }
            [first, second, third] => {
                let rgb = match (self.jfif, self.adobe_transform) {
                    (true, _) => false,
                    (false, Some(transform)) => transform == 0,
                    (false, None) => [first.id, second.id, third.id] == *b"RGB",
                };
                let (h, v) = (self.h_max / second.h, self.v_max / second.v);
                let mut wide = [vec![0; self.width + 2], vec![0; self.width + 2]];
                let mut sums = vec![0; second.width];
                for (y, row) in rows {
                    for (component, wide) in [second, third].into_iter().zip(&mut wide) {
                        component.upsample(y, h, v, &mut sums, wide);
                    }
                    let [second, third] = &wide;
                    if rgb {
                        let first = first.row(y);
                        for (i, pixel) in row.iter_mut().enumerate() {
                            *pixel = [first[i], second[i], third[i]];
                        }
                    } else {
                        to_rgb(first.row(y), second, third, row);
                    }
                }
            }
            _ => return None,
        }
        Some(())
    }
}

impl Component {
    fn row(&self, y: usize) -> &[u8] {
        &self.samples[y * self.blocks_wide * 8..][..self.width]
    }

    /// Transforms the block that was filled into its place; `any` is false if it has no AC coefficients.
    #[inline(always)]
    fn put(&mut self, x: usize, y: usize, quantiser: &[u16; 64], any: bool) {
        let stride = self.blocks_wide * 8;
        let at = y * 8 * stride + x * 8;
        if !any {
            let dc = std::mem::take(&mut self.waiting.free()[0]).wrapping_mul(quantiser[0] as i16);
            let value = ((4 * i32::from(dc) + 16) >> 5) + 128;
            let value = value.clamp(0, 255) as u8;
            for row in 0..8 {
                self.samples[at + row * stride..][..8].fill(value);
            }
        } else if let Some(first) = self.waiting.first.take() {
            let blocks = &mut self.waiting.blocks;
            transform(blocks, quantiser, &mut self.samples, [first, at], stride);
            *blocks = [[0; 64]; 2];
        } else {
            self.waiting.first = Some(at);
        }
    }

    /// Transforms a block that is left waiting, paired with itself.
    fn flush(&mut self, quantiser: &[u16; 64]) {
        if let Some(at) = self.waiting.first.take() {
            let block = std::mem::replace(&mut self.waiting.blocks[0], [0; 64]);
            transform(
                &[block; 2],
                quantiser,
                &mut self.samples,
                [at; 2],
                self.blocks_wide * 8,
            );
        }
    }

    /// Row `y` of the picture from this component's rows, `h` times wider and `v` times higher, by triangle filters.
    #[inline(always)]
    fn upsample(&self, y: usize, h: usize, v: usize, sums: &mut [u16], out: &mut [u8]) {
        let near = self.row(y / v);
        if v == 1 {
            match h {
                1 => out[..near.len()].copy_from_slice(near),
                _ if near.len() > 2 => widen(near, u16::from, 2, [1, 2], out),
                _ => repeat(near, out),
            }
            return;
        }
        if h == 2 && near.len() <= 2 {
            return repeat(near, out);
        }
        // The neighbour on the side where this half of the sample's square lies; the edge repeats itself.
        let far = if y.is_multiple_of(2) {
            (y / 2).saturating_sub(1)
        } else {
            (y / 2 + 1).min(self.height - 1)
        };
        for ((sum, &near), &far) in sums.iter_mut().zip(near).zip(self.row(far)) {
            *sum = 3 * u16::from(near) + u16::from(far);
        }
        if h == 1 {
            let bias = if y.is_multiple_of(2) { 1 } else { 2 };
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = ((*sum + bias) >> 2) as u8;
            }
        } else {
            widen(sums, |sum| sum, 4, [8, 7], out);
        }
    }
}

/// Twice as many samples, each a quarter of its farther neighbour and three of its nearer; `bits` to shift, and what is
/// added before on the left and on the right (the two differ, so that rounding has no bias).
#[inline(always)]
fn widen<T: Copy>(
    samples: &[T],
    value: impl Fn(T) -> u16,
    bits: u32,
    [left, right]: [u16; 2],
    out: &mut [u8],
) {
    let (first, last) = (value(samples[0]), value(samples[samples.len() - 1]));
    let pairs = out[1..].as_chunks_mut::<2>().0.iter_mut();
    for (pair, window) in pairs.zip(samples.windows(2)) {
        let (a, b) = (value(window[0]), value(window[1]));
        let [a, b] = [3 * a + b + right, 3 * b + a + left].map(|sum| sum >> bits);
        *pair = (a | b << 8).to_le_bytes();
    }
    out[0] = ((4 * first + left) >> bits) as u8;
    out[2 * samples.len() - 1] = ((4 * last + right) >> bits) as u8;
}

#[inline(always)]
fn repeat(samples: &[u8], out: &mut [u8]) {
    for (pair, &sample) in out.chunks_mut(2).zip(samples) {
        pair.fill(sample);
    }
}

/// BT.601 in full range, in 16-bit fixed point.
fn to_rgb(y: &[u8], cb: &[u8], cr: &[u8], out: &mut [[u8; 3]]) {
    #[cfg(target_arch = "x86_64")]
    if out.len() >= 16 && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has the instructions.
        return unsafe { avx2::to_rgb(y, cb, cr, out) };
    }
    to_rgb_one_by_one(y, cb, cr, out);
}

fn to_rgb_one_by_one(y: &[u8], cb: &[u8], cr: &[u8], out: &mut [[u8; 3]]) {
    for (pixel, ((&y, &cb), &cr)) in out.iter_mut().zip(y.iter().zip(cb).zip(cr)) {
        let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
        let red = y + ((CR_TO_RED * cr + HALF) >> 16);
        let green = y + ((CB_TO_GREEN * cb + CR_TO_GREEN * cr + HALF) >> 16);
        let blue = y + ((CB_TO_BLUE * cb + HALF) >> 16);
        *pixel = [red, green, blue].map(|value| value.clamp(0, 255) as u8);
    }
}

const HALF: i32 = 1 << 15;
const CR_TO_RED: i32 = 91881;
const CB_TO_GREEN: i32 = -22554;
const CR_TO_GREEN: i32 = -46802;
const CB_TO_BLUE: i32 = 116130;

/// A Huffman table: short codes by lookup, long ones by length.
struct Huffman {
    counts: Vec<u8>,
    symbols: Vec<u8>,
    /// Length and symbol of the code that the index starts with; length 0 if it is longer.
    short: [(u8, u8); 1 << Self::SHORT],
    /// One more than the largest code of a length, left-aligned in 16 bits.
    limit: [u32; 17],
    /// What leads from a code of a length to its symbol's place.
    offset: [i32; 17],
    steps: OnceCell<Box<[Step; 1 << Self::SHORT]>>,
}

/// What the next bits do to a block of AC coefficients: one symbol with its number, or two.
#[derive(Clone, Copy, Default)]
struct Step {
    /// The numbers, the second at the end of the way, 0 if there is none.
    numbers: [i16; 2],
    /// Zeros before the first number.
    run: u8,
    /// How far it is to what comes behind: out of the block, where one of the symbols ends it.
    way: u8,
    /// Bits of both symbols, and of the first alone. 0 if not even the first fits into the index.
    length: u8,
    first_length: u8,
}

impl Huffman {
    const SHORT: u32 = 10;

    /// The table of these codes. A thread keeps the last ones: nearly all files have those of the standard's example.
    fn of(class: usize, number: usize, counts: &[u8], symbols: &[u8]) -> Option<Rc<Self>> {
        type Tables = [[Option<Rc<Huffman>>; 4]; 2];
        thread_local! {
            static LAST: RefCell<Tables> = const { RefCell::new([const { [const { None }; 4] }; 2]) };
        }
        LAST.with_borrow_mut(|last| {
            let slot = last[class].get_mut(number)?;
            match slot {
                Some(table) if table.counts == counts && table.symbols == symbols => Some(table.clone()),
                slot => Some(slot.insert(Rc::new(Self::new(counts, symbols)?)).clone()),
            }
        })
    }

    fn new(counts: &[u8], symbols: &[u8]) -> Option<Self> {
        let mut table = Self {
            counts: counts.to_vec(),
            symbols: symbols.to_vec(),
            short: [(0, 0); 1 << Self::SHORT],
            limit: [0; 17],
            offset: [0; 17],
            steps: OnceCell::new(),
        };
        let (mut code, mut place) = (0u32, 0usize);
        for length in 1..=16u32 {
            let count = usize::from(counts[length as usize - 1]);
            table.offset[length as usize] = place as i32 - code as i32;
            for &symbol in &symbols[place..place + count] {
                if code >= 1 << length {
                    return None;
                }
                if length <= Self::SHORT {
                    let free = Self::SHORT - length;
                    table.short[(code << free) as usize..((code + 1) << free) as usize]
                        .fill((length as u8, symbol));
                }
                code += 1;
            }
            place += count;
            table.limit[length as usize] = code << (16 - length);
            code <<= 1;
        }
        Some(table)
    }

    fn steps(&self) -> &[Step; 1 << Self::SHORT] {
        self.steps.get_or_init(|| {
            let mut steps = Box::new([Step::default(); 1 << Self::SHORT]);
            for (bits, step) in steps.iter_mut().enumerate() {
                let Some(first) = self.step(bits, Self::SHORT) else {
                    continue;
                };
                let left = Self::SHORT - u32::from(first.length);
                let behind = bits << first.length & ((1 << Self::SHORT) - 1);
                *step = match self.step(behind, left) {
                    Some(second) if first.way < Step::END => Step {
                        numbers: [first.numbers[0], second.numbers[0]],
                        way: (first.way + second.way).min(Step::END),
                        length: first.length + second.length,
                        ..first
                    },
                    _ => first,
                };
            }
            steps
        })
    }

    /// The first symbol of `bits`, if it and its number lie within the first `count` bits of the index.
    fn step(&self, bits: usize, count: u32) -> Option<Step> {
        let (length, symbol) = self.short[bits];
        let (run, size) = (symbol >> 4, u32::from(symbol & 15));
        let all = u32::from(length) + size;
        if length == 0 || all > count {
            return None;
        }
        let number = (bits >> (Self::SHORT - all)) as u32 & ((1 << size) - 1);
        Some(Step {
            length: all as u8,
            first_length: all as u8,
            ..Step::new(run, size, signed(number, size) as i16)
        })
    }
}

impl Step {
    /// A way out of every block.
    const END: u8 = 64;

    fn new(run: u8, size: u32, number: i16) -> Self {
        let ends = size == 0 && run != 15;
        Self {
            numbers: [number, 0],
            run: if ends { 0 } else { run },
            way: if ends { Self::END } else { run + 1 },
            ..Self::default()
        }
    }
}

/// The number that `size` bits stand for; their lower half are the negative ones.
#[inline(always)]
fn signed(bits: u32, size: u32) -> i32 {
    let least = 1i32 << size >> 1;
    let below = i32::from((bits as i32) < least);
    bits as i32 - below * ((1 << size) - 1)
}

/// Bits of an entropy-coded segment, the first in the highest place; zeros behind its end.
#[derive(Clone, Copy)]
struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    bits: u64,
    count: u32,
    /// How many of `count` are not of the file.
    padding: u32,
}

impl<'a> Bits<'a> {
    fn new(data: &'a [u8], at: usize) -> Self {
        Self {
            data,
            at,
            bits: 0,
            count: 0,
            padding: 0,
        }
    }

    /// At least 32 bits ahead.
    #[inline(always)]
    fn refill(&mut self) {
        if self.count < 32 {
            self.refill_bytes();
        }
    }

    #[inline(always)]
    fn refill_bytes(&mut self) {
        // Eight bytes without a 0xFF, as almost always: as many as there is room for, and the beginning of the next,
        // which will be read again.
        if let Some(bytes) = self.data.get(self.at..).and_then(<[u8]>::first_chunk) {
            let bytes = u64::from_be_bytes(*bytes);
            let gaps = !bytes;
            if gaps.wrapping_sub(0x0101_0101_0101_0101) & bytes & 0x8080_8080_8080_8080 == 0 {
                self.bits |= bytes >> self.count;
                let taken = (64 - self.count) / 8;
                self.at += taken as usize;
                self.count += taken * 8;
                return;
            }
        }
        *self = self.refilled_slowly();
    }

    /// By value, so that the fast way can keep everything in registers.
    #[cold]
    #[inline(never)]
    fn refilled_slowly(mut self) -> Self {
        while self.count <= 56 {
            let byte = match self.data.get(self.at) {
                Some(0xFF) if self.data.get(self.at + 1) == Some(&0) => {
                    self.at += 2;
                    0xFF
                }
                Some(&byte) if byte != 0xFF => {
                    self.at += 1;
                    byte
                }
                // A marker or the end of the file.
                _ => {
                    self.padding += 8;
                    0
                }
            };
            self.bits |= u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
        self
    }

    /// Whether bits were taken that the file does not have.
    fn overran(&self) -> bool {
        self.count < self.padding
    }

    /// Where the next marker is.
    fn position(&self) -> usize {
        self.at
    }

    #[inline(always)]
    fn skip(&mut self, count: u32) {
        self.bits <<= count;
        self.count -= count;
    }

    /// The next bits as a number; at most 16, after a refill of which at most 16 were taken.
    #[inline(always)]
    fn ahead(&mut self, count: u32) -> u32 {
        let value = ((self.bits >> 1) >> (63 - count)) as u32;
        self.skip(count);
        value
    }

    /// The next bits as a number; at most 16.
    fn take(&mut self, count: u32) -> u32 {
        self.refill();
        self.ahead(count)
    }

    /// A Huffman symbol; 16 bits are still ahead afterwards.
    #[inline(always)]
    fn symbol(&mut self, table: &Huffman) -> Option<u8> {
        self.refill();
        let (length, symbol) = table.short[(self.bits >> (64 - Huffman::SHORT)) as usize];
        if length != 0 {
            self.skip(u32::from(length));
            return Some(symbol);
        }
        let code = (self.bits >> 48) as u32;
        let length = (Huffman::SHORT + 1..=16).find(|&length| code < table.limit[length as usize])?;
        self.skip(length);
        let place = (code >> (16 - length)) as i32 + table.offset[length as usize];
        table.symbols.get(usize::try_from(place).ok()?).copied()
    }

    #[inline(always)]
    fn difference(&mut self, table: &Huffman) -> Option<i32> {
        let size = u32::from(self.symbol(table)?);
        (size <= 15).then(|| signed(self.ahead(size), size))
    }

    /// All AC coefficients of a block; answers whether one is not 0.
    #[inline(always)]
    fn coefficients(&mut self, table: &Huffman, block: &mut Block) -> Option<bool> {
        let steps = table.steps();
        let (mut bits, mut k, mut any) = (*self, 1, 0);
        while k < 64 {
            bits.refill();
            let step = steps[(bits.bits >> (64 - Huffman::SHORT)) as usize];
            if step.length == 0 {
                // A long code or a large number.
                let symbol = bits.symbol(table)?;
                let (run, size) = (symbol >> 4, u32::from(symbol & 15));
                let step = Step::new(run, size, signed(bits.ahead(size), size) as i16);
                block[usize::from(ZIGZAG[k + usize::from(step.run)])] = step.numbers[0];
                any |= step.numbers[0];
                k += usize::from(step.way);
                continue;
            }
            let first = k + usize::from(step.run);
            k += usize::from(step.way);
            // The second number before the first: where there is none, it is a 0 on the first one's place or behind it.
            block[usize::from(ZIGZAG[k - 1])] = step.numbers[1];
            block[usize::from(ZIGZAG[first])] = step.numbers[0];
            any |= step.numbers[0] | step.numbers[1];
            let before = bits;
            bits.skip(u32::from(step.length));
            if k >= 64 {
                if first >= 63 {
                    // Full with the first: the second symbol is another block's.
                    bits = before;
                    bits.skip(u32::from(step.first_length));
                }
                break;
            }
        }
        *self = bits;
        Some(any != 0)
    }

    /// First scan of a band of AC coefficients.
    fn first_band(
        &mut self,
        table: &Huffman,
        scan: &Scan,
        block: &mut Block,
        end_of_band: &mut u32,
    ) -> Option<()> {
        if *end_of_band > 0 {
            *end_of_band -= 1;
            return Some(());
        }
        let mut k = scan.start;
        while k <= scan.end {
            let symbol = self.symbol(table)?;
            let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
            if size == 0 {
                if run < 15 {
                    *end_of_band = (1 << run) - 1 + self.ahead(run);
                    break;
                }
                k += 16;
                continue;
            }
            k += run as usize;
            block[usize::from(ZIGZAG[k])] = (signed(self.ahead(size), size) << scan.low) as i16;
            k += 1;
        }
        Some(())
    }

    /// A later scan: one more bit for coefficients that are not 0, and new ones of one bit.
    fn refine_band(
        &mut self,
        table: &Huffman,
        scan: &Scan,
        block: &mut Block,
        end_of_band: &mut u32,
    ) -> Option<()> {
        let bit = 1i16 << scan.low;
        let refine = |bits: &mut Self, value: &mut i16| {
            if bits.take(1) == 1 && *value & bit == 0 {
                *value = value.wrapping_add(if *value > 0 { bit } else { -bit });
            }
        };
        let mut k = scan.start;
        if *end_of_band == 0 {
            while k <= scan.end {
                let symbol = self.symbol(table)?;
                let (mut run, size) = (u32::from(symbol >> 4), symbol & 15);
                let mut new = 0;
                match size {
                    0 if run < 15 => {
                        *end_of_band = (1 << run) + self.ahead(run);
                        break;
                    }
                    0 => {}
                    1 => new = if self.ahead(1) == 1 { bit } else { -bit },
                    _ => return None,
                }
                while k <= scan.end {
                    let value = &mut block[usize::from(ZIGZAG[k])];
                    k += 1;
                    if *value != 0 {
                        refine(self, value);
                    } else if run == 0 {
                        *value = new;
                        break;
                    } else {
                        run -= 1;
                    }
                }
            }
        }
        if *end_of_band > 0 {
            for &place in &ZIGZAG[k..scan.end + 1] {
                let value = &mut block[usize::from(place)];
                if *value != 0 {
                    refine(self, value);
                }
            }
            *end_of_band -= 1;
        }
        Some(())
    }

    /// Goes on behind the restart marker, which has to be next.
    fn restart(&mut self) -> Option<()> {
        if self.overran() {
            return None;
        }
        while self.data.get(self.at) == Some(&0xFF) && self.data.get(self.at + 1) == Some(&0xFF) {
            self.at += 1;
        }
        let (0xFF, 0xD0..=0xD7) = (*self.data.get(self.at)?, *self.data.get(self.at + 1)?) else {
            return None;
        };
        *self = Self::new(self.data, self.at + 2);
        Some(())
    }
}

/// Inverse transform of two blocks into eight rows of samples each, from the places `at` on.
fn transform(blocks: &[Block; 2], quantiser: &[u16; 64], samples: &mut [u8], at: [usize; 2], stride: usize) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has the instructions.
        return unsafe { avx2::transform(blocks, quantiser, samples, at, stride) };
    }
    transform_arrays(blocks, quantiser, samples, at, stride);
}

fn transform_arrays(
    blocks: &[Block; 2],
    quantiser: &[u16; 64],
    samples: &mut [u8],
    at: [usize; 2],
    stride: usize,
) {
    for (block, at) in blocks.iter().zip(at) {
        let mut rows: [[i16; 8]; 8] = std::array::from_fn(|y| {
            std::array::from_fn(|x| block[y * 8 + x].wrapping_mul(quantiser[y * 8 + x] as i16))
        });
        pass::<_, FIRST>(&mut rows);
        rows = std::array::from_fn(|y| std::array::from_fn(|x| rows[x][y]));
        pass::<_, SECOND>(&mut rows);
        for (y, out) in samples[at..].chunks_mut(stride).take(8).enumerate() {
            for (x, out) in out[..8].iter_mut().enumerate() {
                *out = (i32::from(rows[x][y]) + 128).clamp(0, 255) as u8;
            }
        }
    }
}

/// What the pass over columns drops of the 13 bits of its factors: it keeps two more.
const FIRST: i32 = 13 - 2;
/// What the pass over rows drops: its factors' bits, the two, and three for the scale of both passes.
const SECOND: i32 = 13 + 2 + 3;

/// Numbers of 16 bits side by side, as processors multiply them fastest: in pairs, with sums of 32 bits.
trait Lanes: Copy {
    type Sums: Copy;
    /// In 16 bits: only damage overflows.
    fn plus(self, other: Self) -> Self;
    /// Each number times the first factor, the other's times the second.
    fn mix(self, other: Self, factors: [i16; 2]) -> Self::Sums;
    fn all(value: i32) -> Self::Sums;
    fn sum(a: Self::Sums, b: Self::Sums) -> Self::Sums;
    fn difference(a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// Without the lowest `SHIFT` bits; what does not fit into 16 bits becomes the largest or smallest that does.
    fn shift<const SHIFT: i32>(sums: Self::Sums) -> Self;
}

impl Lanes for [i16; 8] {
    type Sums = [i32; 8];

    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i].wrapping_add(other[i]))
    }

    #[inline(always)]
    fn mix(self, other: Self, factors: [i16; 2]) -> [i32; 8] {
        let [a, b] = factors.map(i32::from);
        std::array::from_fn(|i| a * i32::from(self[i]) + b * i32::from(other[i]))
    }

    #[inline(always)]
    fn all(value: i32) -> [i32; 8] {
        [value; 8]
    }

    #[inline(always)]
    fn sum(a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }

    #[inline(always)]
    fn difference(a: [i32; 8], b: [i32; 8]) -> [i32; 8] {
        std::array::from_fn(|i| a[i].wrapping_sub(b[i]))
    }

    #[inline(always)]
    fn shift<const SHIFT: i32>(sums: [i32; 8]) -> Self {
        sums.map(|sum| (sum >> SHIFT).clamp(i16::MIN.into(), i16::MAX.into()) as i16)
    }
}

/// The one-dimensional transform of Loeffler, Ligtenberg and Moschytz (1989), as `jidctint.c` rounds it, and ordered as
/// libjpeg-turbo's vector code orders it.
#[inline(always)]
fn pass<L: Lanes, const SHIFT: i32>(rows: &mut [L; 8]) {
    let [x0, x1, x2, x3, x4, x5, x6, x7] = *rows;

    let half = L::all(1 << (SHIFT - 1));
    let even0 = L::sum(x0.mix(x4, [1 << 13, 1 << 13]), half);
    let even1 = L::sum(x0.mix(x4, [1 << 13, -1 << 13]), half);
    let even2 = x2.mix(x6, [4433, 4433 - 15137]);
    let even3 = x2.mix(x6, [4433 + 6270, 4433]);
    let (a0, a3) = (L::sum(even0, even3), L::difference(even0, even3));
    let (a1, a2) = (L::sum(even1, even2), L::difference(even1, even2));

    let (z3, z4) = (x7.plus(x3), x5.plus(x1));
    let odd3 = z3.mix(z4, [9633 - 16069, 9633]);
    let odd4 = z3.mix(z4, [9633, 9633 - 3196]);
    let b0 = L::sum(x7.mix(x1, [2446 - 7373, -7373]), odd3);
    let b1 = L::sum(x5.mix(x3, [16819 - 20995, -20995]), odd4);
    let b2 = L::sum(x5.mix(x3, [-20995, 25172 - 20995]), odd3);
    let b3 = L::sum(x7.mix(x1, [-7373, 12299 - 7373]), odd4);

    *rows = [
        L::shift::<SHIFT>(L::sum(a0, b3)),
        L::shift::<SHIFT>(L::sum(a1, b2)),
        L::shift::<SHIFT>(L::sum(a2, b1)),
        L::shift::<SHIFT>(L::sum(a3, b0)),
        L::shift::<SHIFT>(L::difference(a3, b0)),
        L::shift::<SHIFT>(L::difference(a2, b1)),
        L::shift::<SHIFT>(L::difference(a1, b2)),
        L::shift::<SHIFT>(L::difference(a0, b3)),
    ];
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{Block, FIRST, Lanes, SECOND, pass};

    /// A row of two blocks. Made and used only inside [`transform`].
    #[derive(Clone, Copy)]
    struct Row(__m256i);

    impl Lanes for Row {
        /// The lower and the upper four numbers of each block.
        type Sums = [__m256i; 2];

        #[inline(always)]
        fn plus(self, other: Self) -> Self {
            // SAFETY: whoever has a row has AVX2; so below.
            Self(unsafe { _mm256_add_epi16(self.0, other.0) })
        }

        #[inline(always)]
        fn mix(self, other: Self, [a, b]: [i16; 2]) -> Self::Sums {
            // SAFETY: as above.
            unsafe {
                let factors = _mm256_set1_epi32(i32::from(a) & 0xFFFF | i32::from(b) << 16);
                let (low, high) = (
                    _mm256_unpacklo_epi16(self.0, other.0),
                    _mm256_unpackhi_epi16(self.0, other.0),
                );
                [_mm256_madd_epi16(low, factors), _mm256_madd_epi16(high, factors)]
            }
        }

        #[inline(always)]
        fn all(value: i32) -> Self::Sums {
            // SAFETY: as above.
            [unsafe { _mm256_set1_epi32(value) }; 2]
        }

        #[inline(always)]
        fn sum(a: Self::Sums, b: Self::Sums) -> Self::Sums {
            // SAFETY: as above.
            unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
        }

        #[inline(always)]
        fn difference(a: Self::Sums, b: Self::Sums) -> Self::Sums {
            // SAFETY: as above.
            unsafe { [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])] }
        }

        #[inline(always)]
        fn shift<const SHIFT: i32>([low, high]: Self::Sums) -> Self {
            // SAFETY: as above.
            unsafe {
                Self(_mm256_packs_epi32(
                    _mm256_srai_epi32::<SHIFT>(low),
                    _mm256_srai_epi32::<SHIFT>(high),
                ))
            }
        }
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn transform(
        blocks: &[Block; 2],
        quantiser: &[u16; 64],
        samples: &mut [u8],
        at: [usize; 2],
        stride: usize,
    ) {
        let [first, second] = blocks;
        let mut rows: [Row; 8] = std::array::from_fn(|y| {
            // SAFETY: eight numbers of 16 bits can be read at each pointer.
            unsafe {
                let [first, second] = [first, second].map(|block| block[y * 8..].as_ptr().cast());
                let row = _mm256_loadu2_m128i(second, first);
                let factors = _mm_loadu_si128(quantiser[y * 8..].as_ptr().cast());
                Row(_mm256_mullo_epi16(row, _mm256_broadcastsi128_si256(factors)))
            }
        });
        pass::<_, FIRST>(&mut rows);
        transpose(&mut rows);
        pass::<_, SECOND>(&mut rows);
        // In registers of columns: bytes, which are then sorted to rows.
        let bytes = |left: usize| {
            let bytes = _mm256_packs_epi16(rows[left].0, rows[left + 4].0);
            _mm256_xor_si256(bytes, _mm256_set1_epi8(i8::MIN))
        };
        let pairs = |a, b| (_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b));
        let (even_left, even_right) = pairs(bytes(0), bytes(2));
        let (odd_left, odd_right) = pairs(bytes(1), bytes(3));
        let (left_top, left_bottom) = pairs(even_left, odd_left);
        let (right_top, right_bottom) = pairs(even_right, odd_right);
        let halves = |left, right| {
            [
                _mm256_unpacklo_epi32(left, right),
                _mm256_unpackhi_epi32(left, right),
            ]
        };
        let [rows01, rows23] = halves(left_top, right_top);
        let [rows45, rows67] = halves(left_bottom, right_bottom);
        for at in at {
            assert!(samples[at..].len() >= 7 * stride + 8);
        }
        let samples = samples.as_mut_ptr();
        for (two, rows) in [rows01, rows23, rows45, rows67].into_iter().enumerate() {
            let blocks = [_mm256_castsi256_si128(rows), _mm256_extracti128_si256::<1>(rows)];
            for (block, at) in blocks.into_iter().zip(at) {
                // SAFETY: all eight rows lie within the samples, as just made sure.
                unsafe {
                    let row = samples.add(at + 2 * two * stride);
                    _mm_storel_epi64(row.cast(), block);
                    _mm_storel_epi64(row.add(stride).cast(), _mm_unpackhi_epi64(block, block));
                }
            }
        }
    }

    /// [`super::to_rgb`] for at least sixteen pixels. The last sixteen may overlap those before.
    ///
    /// Products are halves of 32 bits: a factor is a whole number and a rest that fits into 16 bits, and what is left of
    /// a product of twice the sample, plus one, halved, is the rounded product of the sample.
    #[target_feature(enable = "avx2")]
    pub(super) fn to_rgb(y: &[u8], cb: &[u8], cr: &[u8], out: &mut [[u8; 3]]) {
        let last = out.len() - 16;
        for at in (0..out.len()).step_by(16).map(|at| at.min(last)) {
            let load = |samples: &[u8]| {
                let sixteen = &samples[at..][..16];
                // SAFETY: sixteen bytes can be read.
                _mm256_cvtepu8_epi16(unsafe { _mm_loadu_si128(sixteen.as_ptr().cast()) })
            };
            let centred = |samples| _mm256_sub_epi16(load(samples), _mm256_set1_epi16(128));
            let (y, cb, cr) = (load(y), centred(cb), centred(cr));
            let times = |samples, rest: i32| {
                let twice = _mm256_add_epi16(samples, samples);
                let product = _mm256_mulhi_epi16(twice, _mm256_set1_epi16(rest as i16));
                _mm256_srai_epi16::<1>(_mm256_add_epi16(product, _mm256_set1_epi16(1)))
            };
            let red = _mm256_add_epi16(cr, times(cr, super::CR_TO_RED - (1 << 16)));
            let blue = _mm256_add_epi16(_mm256_add_epi16(cb, cb), times(cb, super::CB_TO_BLUE - (2 << 16)));
            let factors =
                _mm256_set1_epi32(super::CB_TO_GREEN & 0xFFFF | (super::CR_TO_GREEN + (1 << 16)) << 16);
            let mixed = |pairs| {
                let rounded =
                    _mm256_add_epi32(_mm256_madd_epi16(pairs, factors), _mm256_set1_epi32(super::HALF));
                _mm256_srai_epi32::<16>(rounded)
            };
            let green = _mm256_packs_epi32(
                mixed(_mm256_unpacklo_epi16(cb, cr)),
                mixed(_mm256_unpackhi_epi16(cb, cr)),
            );
            let green = _mm256_sub_epi16(green, cr);
            let [red, green, blue] = [red, green, blue].map(|colour| {
                let words = _mm256_add_epi16(y, colour);
                _mm_packus_epi16(
                    _mm256_castsi256_si128(words),
                    _mm256_extracti128_si256::<1>(words),
                )
            });
            let bytes = out[at..][..16].as_flattened_mut().as_chunks_mut::<16>().0;
            for (third, bytes) in bytes.iter_mut().enumerate() {
                // Byte `at` of the 48 is colour `at % 3` of pixel `at / 3`.
                let of_colour = |colour: usize| {
                    let places: [i8; 16] = std::array::from_fn(|byte| {
                        let at = third * 16 + byte;
                        if at % 3 == colour { (at / 3) as i8 } else { -1 }
                    });
                    i128::from_le_bytes(places.map(|place| place as u8))
                };
                let pick = |pixels, colour| {
                    let places = of_colour(colour);
                    let places = _mm_set_epi64x((places >> 64) as i64, places as i64);
                    _mm_shuffle_epi8(pixels, places)
                };
                let joined = _mm_or_si128(_mm_or_si128(pick(red, 0), pick(green, 1)), pick(blue, 2));
                let (low, high) = (_mm_cvtsi128_si64(joined), _mm_extract_epi64::<1>(joined));
                bytes[..8].copy_from_slice(&low.to_le_bytes());
                bytes[8..].copy_from_slice(&high.to_le_bytes());
            }
        }
    }

    #[target_feature(enable = "avx2")]
    fn transpose(rows: &mut [Row; 8]) {
        let r = rows.map(|row| row.0);
        let pairs = |a, b| (_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b));
        let (a0, a1) = pairs(r[0], r[1]);
        let (a2, a3) = pairs(r[2], r[3]);
        let (a4, a5) = pairs(r[4], r[5]);
        let (a6, a7) = pairs(r[6], r[7]);
        let quads = |a, b| (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let (b0, b1) = quads(a0, a2);
        let (b2, b3) = quads(a1, a3);
        let (b4, b5) = quads(a4, a6);
        let (b6, b7) = quads(a5, a7);
        let upper = |a, b| Row(_mm256_unpacklo_epi64(a, b));
        let lower = |a, b| Row(_mm256_unpackhi_epi64(a, b));
        *rows = [
            upper(b0, b4),
            lower(b0, b4),
            upper(b1, b5),
            lower(b1, b5),
            upper(b2, b6),
            lower(b2, b6),
            upper(b3, b7),
            lower(b3, b7),
        ];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/jpeg")
    }

    /// The PNGs hold what Pillow, that is libjpeg-turbo, decodes.
    #[test]
    fn equals_libjpeg_turbo() {
        let mut compared = 0;
        for entry in std::fs::read_dir(folder()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "jpg") {
                let image = decode(&std::fs::read(&path).unwrap(), DecodeLimits::default());
                let expected = Image::read(path.with_extension("png")).unwrap();
                assert!(image == Ok((expected, Orientation::NoTransforms)), "{path:?}");
                compared += 1;
            }
        }
        assert_eq!(compared, 12);
    }

    #[test]
    fn transforms_agree() {
        let quantiser: [u16; 64] = std::array::from_fn(|i| 1 + (i * 7 % 40) as u16);
        let both = |blocks: &[Block; 2], quantiser| {
            let (mut fast, mut plain) = ([0; 8 * 19], [0; 8 * 19]);
            transform(blocks, quantiser, &mut fast, [1, 9], 19);
            transform_arrays(blocks, quantiser, &mut plain, [1, 9], 19);
            assert_eq!(fast, plain);
            fast
        };
        for seed in 0..200i32 {
            // From the faint to what only damage brings.
            let blocks = [seed, seed + 1000].map(|seed| {
                let number = |i: i32| (i * 7919 + seed * 104_729) % 65536 - 32768;
                std::array::from_fn(|i| (number(i as i32) >> (seed % 12)) as i16)
            });
            both(&blocks, &quantiser);
        }
        for dc in (-0x8000..0x8000).step_by(97) {
            let mut component = Component {
                blocks_wide: 1,
                samples: vec![0; 64],
                ..Component::default()
            };
            let mut block = [0; 64];
            block[0] = dc as i16;
            *component.waiting.free() = block;
            component.put(0, 0, &quantiser, false);
            assert_eq!(component.samples[0], both(&[block; 2], &quantiser)[1]);
            assert_eq!(*component.waiting.free(), [0; 64]);
        }
    }

    #[test]
    fn steps_agree_with_symbols() {
        let counts = [0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125];
        let mut symbols: Vec<u8> = (0..=255)
            .filter(|symbol| matches!(symbol & 15, 1..=10) || matches!(symbol, 0 | 0xF0))
            .collect();
        let mut state = 1u32;
        let mut byte = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24).min(0xFE) as u8
        };
        // Short codes for what ends a block, then for what overruns it, then for small numbers.
        let orders: [fn(&u8) -> u8; 3] = [|_| 0, |symbol| 255 - symbol, |symbol| symbol & 15];
        for order in orders {
            symbols.sort_by_key(order);
            let table = Huffman::new(&counts, &symbols).unwrap();
            let data: Vec<u8> = (0..20_000).map(|_| byte()).collect();
            let (mut fast, mut plain) = (Bits::new(&data, 0), Bits::new(&data, 0));
            let read = |bits: &Bits| bits.at * 8 + (bits.padding as usize) - bits.count as usize;
            while !plain.overran() {
                let (mut expected, mut k) = ([0; 64], 1);
                while k < 64 {
                    let Some(symbol) = plain.symbol(&table) else {
                        break;
                    };
                    let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
                    if size == 0 && run != 15 {
                        break;
                    }
                    k += run;
                    if size != 0 {
                        expected[usize::from(ZIGZAG[k])] = signed(plain.ahead(size), size) as i16;
                    }
                    k += 1;
                }
                let mut block = [0; 64];
                match fast.coefficients(&table, &mut block) {
                    Some(any) => {
                        assert_eq!(block, expected);
                        assert_eq!(any, block != [0; 64]);
                    }
                    // No symbol has this code.
                    None => break,
                }
                assert_eq!(read(&fast), read(&plain));
            }
            assert!(fast.at > 1000, "{}", fast.at);
        }
    }

    #[test]
    fn colours_agree() {
        let samples = |step: usize| -> Vec<u8> { (0..=255).cycle().step_by(step).take(61).collect() };
        for y in [1, 3, 29] {
            for cb in 0..=255 {
                for shift in 0..61 {
                    let (y, mut cr) = (samples(y), samples(5));
                    cr.rotate_left(shift);
                    let (mut fast, mut plain) = ([[0; 3]; 61], [[0; 3]; 61]);
                    to_rgb(&y, &[cb; 61], &cr, &mut fast);
                    to_rgb_one_by_one(&y, &[cb; 61], &cr, &mut plain);
                    assert_eq!(fast, plain);
                }
            }
        }
    }

    #[test]
    fn leaves_what_is_broken_to_the_general_decoder() {
        let bytes = std::fs::read(folder().join("420.jpg")).unwrap();
        for end in (0..bytes.len()).step_by(7) {
            assert!(
                decode(&bytes[..end], DecodeLimits::default()).is_err(),
                "cut to {end}"
            );
        }
        assert!(decode(&bytes, DecodeLimits { max_pixels: 100 }) == Err(Refusal::NotCovered));
        assert!(decode(b"\x89PNG", DecodeLimits::default()).is_err());
    }

    #[test]
    fn answers_the_orientation() {
        let bytes = std::fs::read(folder().join("progressive.jpg")).unwrap();
        let upright = decode(&bytes, DecodeLimits::default()).unwrap().0;
        let mut mirrored =
            b"\xFF\xD8\xFF\xE1\0\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x02\0\0\0\0\0\0"
                .to_vec();
        mirrored.extend(&bytes[2..]);
        let decoded = decode(&mirrored, DecodeLimits::default());
        assert_eq!(decoded, Ok((upright.clone(), Orientation::FlipHorizontal)));
        assert_eq!(
            Image::decode(&mirrored, "mirrored").unwrap(),
            upright.flip_horizontal()
        );
    }

    #[test]
    fn leaves_endless_scans_to_the_general_decoder() {
        let bytes = std::fs::read(folder().join("progressive.jpg")).unwrap();
        let end = bytes.len() - 2;
        // Nothing but the end of the first component's bands, again and again.
        let scan = b"\xFF\xC4\0\x14\x10\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xE0\xFF\xDA\0\x08\x01\x01\0\x01\x3F\0\x7F\xFF\0\xFF\0";
        let with_scans = |count: usize| [&bytes[..end], &scan.repeat(count), &bytes[end..]].concat();
        assert!(decode(&with_scans(50), DecodeLimits::default()).is_ok());
        assert!(decode(&with_scans(100), DecodeLimits::default()).is_err());
        let text = Image::decode(&with_scans(200), "endless")
            .unwrap_err()
            .to_string();
        assert!(text.contains("scans"), "{text}");
    }
}
