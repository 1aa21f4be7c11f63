# Sets the suite up in this folder, without a network: powershell -ExecutionPolicy Bypass -File install.ps1
Set-Location $PSScriptRoot
$env:PYTHONHOME = $null
$env:PYTHONPATH = $null

$python = $null
foreach ($each in @($env:PYTHON, "python", "python3")) {
    if ($each -and (Get-Command $each -ErrorAction SilentlyContinue)) {
        & $each -c "@CHECK@"
        if ($LASTEXITCODE -eq 0) { $python = $each; break }
    }
}
if (-not $python) {
    Write-Host "This bundle is for Python @PYTHON@ on @PLATFORM@, which was not found here; install it, or name it in the variable PYTHON."
    exit 1
}

& $python -m venv .venv
if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
$python = Join-Path ".venv" "Scripts\python.exe"
& $python -m pip install --quiet --disable-pip-version-check --no-index --find-links wheels -r requirements.txt -e .
if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
& $python -m helpers.suite.doctor
if ($LASTEXITCODE -ne 0) { exit $LASTEXITCODE }
Write-Host "Open the notebooks: $python -m jupyterlab notebooks"
