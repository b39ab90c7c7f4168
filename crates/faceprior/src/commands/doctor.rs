//! `faceprior doctor`: what this build and machine can do, and how to mend what is missing.

use std::process::Command;

use anyhow::Result;
use faceprior::device;
use serde::Serialize;

use super::Context;

#[derive(Serialize)]
struct Findings {
    version: &'static str,
    threads: usize,
    processor: String,
    instructions: Vec<&'static str>,
    kernels: &'static str,
    features: Vec<&'static str>,
    devices: Vec<Usable>,
    programs: Vec<Usable>,
}

/// Something that is there, or what is missing and the cure.
#[derive(Serialize)]
struct Usable {
    name: String,
    ok: bool,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

pub fn run(context: &Context) -> Result<()> {
    let findings = Findings {
        version: env!("CARGO_PKG_VERSION"),
        threads: rayon::current_num_threads(),
        processor: device::processor(),
        instructions: instructions(),
        kernels: faceprior::ops::instruction_set().map_err(anyhow::Error::msg)?,
        features: device::built_features(),
        devices: devices(),
        programs: vec![
            program(
                "ffmpeg",
                "-version",
                "collecting from videos needs it (Debian: apt install ffmpeg)",
            ),
            program(
                "yt-dlp",
                "--version",
                "collecting from the web needs it (pip install yt-dlp)",
            ),
        ],
    };
    if context.json {
        return super::print_json(&findings);
    }
    println!("faceprior {}", findings.version);
    println!("threads       {}", findings.threads);
    println!("processor     {}", findings.processor);
    println!("instructions  {}", findings.instructions.join(", "));
    println!(
        "kernels       {} (FACEPRIOR_ISA chooses another)",
        findings.kernels
    );
    let features = if findings.features.is_empty() {
        "cpu only".to_owned()
    } else {
        findings.features.join(", ")
    };
    println!("built with    {features}");
    for (title, entries) in [("devices", &findings.devices), ("programs", &findings.programs)] {
        println!("{title}");
        for entry in entries {
            let mark = if entry.ok { "ok" } else { "--" };
            println!("  {mark}  {:<8} {}", entry.name, entry.detail);
            if let Some(hint) = &entry.hint {
                println!("               hint: {hint}");
            }
        }
    }
    Ok(())
}

/// The instruction sets that kernels choose among.
fn instructions() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let sets = [
        ("avx512", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let sets: [(&str, bool); 0] = [];
    let found: Vec<_> = sets
        .into_iter()
        .filter_map(|(name, there)| there.then_some(name))
        .collect();
    if found.is_empty() { vec!["portable"] } else { found }
}

fn devices() -> Vec<Usable> {
    ["cpu", "cuda", "rocm", "vulkan", "metal", "wgpu"]
        .into_iter()
        .map(|name| match device::open(name) {
            Ok(_) => Usable {
                name: name.to_owned(),
                ok: true,
                detail: "usable".to_owned(),
                hint: None,
            },
            Err(error) => {
                let message = error.to_string();
                let (detail, hint) = message.split_once("\nhint: ").unwrap_or((&message, ""));
                let hint = (!hint.is_empty()).then(|| hint.to_owned());
                Usable {
                    name: name.to_owned(),
                    ok: false,
                    detail: detail.to_owned(),
                    hint,
                }
            }
        })
        .collect()
}

fn program(name: &str, version_flag: &str, need: &str) -> Usable {
    let output = Command::new(name)
        .arg(version_flag)
        .output()
        .ok()
        .filter(|output| output.status.success());
    match output {
        Some(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            let detail = text.lines().next().unwrap_or_default().to_owned();
            Usable {
                name: name.to_owned(),
                ok: true,
                detail,
                hint: None,
            }
        }
        None => Usable {
            name: name.to_owned(),
            ok: false,
            detail: "not found".to_owned(),
            hint: Some(need.to_owned()),
        },
    }
}
