// Package packages installs the packages that "make package" has made into a
// root of their own, and has systemd look at the units.
package packages

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// most is the exposure that "systemd-analyze security" may see in a unit, of 10.
const most = 2.5

func TestPackages(t *testing.T) {
	from := os.Getenv("PACKAGES")
	if from == "" {
		t.Skip("run by make package-test, which makes the packages")
	}
	figures := map[string]float64{}
	tried, failed := 0, 0
	step := func(name string, f func(t *testing.T)) {
		tried++
		if !t.Run(name, f) {
			failed++
		}
	}
	root := t.TempDir()
	deb := one(t, from, "*.deb")
	step("the .deb is installed", func(t *testing.T) { install(t, root, deb) })
	step("the programs run", func(t *testing.T) { programs(t, root) })
	step("no file is open to others", func(t *testing.T) { figures["files"] = float64(modes(t, root)) })
	units, err := filepath.Glob(filepath.Join(root, "usr/lib/systemd/system", "*.service"))
	if err != nil || len(units) != 4 {
		t.Fatalf("units: %v %v", units, err)
	}
	for _, u := range units {
		name := strings.TrimSuffix(filepath.Base(u), ".service")
		step("systemd takes "+name, func(t *testing.T) {
			verify(t, root, u)
			figures["exposure_"+strings.Trim(strings.TrimPrefix(name, "sallyport-"), "@")] = exposure(t, u)
			figures["units"]++
		})
	}
	step("the .rpm is one", func(t *testing.T) {
		b, err := os.ReadFile(one(t, from, "*.rpm"))
		if err != nil || !bytes.HasPrefix(b, []byte{0xed, 0xab, 0xee, 0xdb}) {
			t.Fatalf("no lead of an RPM: %v", err)
		}
		figures["rpm_bytes"] = float64(len(b))
	})
	step("it is removed", func(t *testing.T) { remove(t, root) })
	if info, err := os.Stat(deb); err == nil {
		figures["deb_bytes"] = float64(info.Size())
	}
	out, err := json.Marshal(map[string]any{
		"name": "package", "ok": failed == 0, "cases": map[string]int{"tried": tried, "passed": tried - failed, "failed": failed}, "figures": figures,
	})
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println(string(out))
}

func one(t *testing.T, dir, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s in %s: %v %v", pattern, dir, found, err)
	}
	return found[0]
}

// dpkg works on a root that has a database and nothing else.
func dpkg(t *testing.T, root string, args ...string) {
	t.Helper()
	full := append([]string{"--root=" + root, "--force-not-root", "--force-script-chrootless", "--force-depends", "--log=" + filepath.Join(root, "dpkg.log")}, args...)
	if out, err := exec.Command("dpkg", full...).CombinedOutput(); err != nil {
		t.Fatalf("dpkg %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func install(t *testing.T, root, deb string) {
	db := filepath.Join(root, "var/lib/dpkg")
	if err := errors.Join(os.MkdirAll(filepath.Join(db, "info"), 0o755), os.MkdirAll(filepath.Join(db, "updates"), 0o755), os.WriteFile(filepath.Join(db, "status"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	dpkg(t, root, "-i", deb)
	out, err := exec.Command("dpkg-query", "--admindir="+db, "-W", "-f", "${db:Status-Status}", "sallyport").CombinedOutput()
	if err != nil || string(out) != "installed" {
		t.Errorf("it is %q, %v", out, err)
	}
}

func remove(t *testing.T, root string) {
	dpkg(t, root, "--purge", "sallyport")
	for _, dir := range []string{"usr/bin", "usr/lib/systemd/system", "etc/sallyport"} {
		if left, _ := filepath.Glob(filepath.Join(root, dir, "*")); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
}

// programs are static, and start.
func programs(t *testing.T, root string) {
	for _, p := range []string{"issuer", "sidecar", "gateway", "sallyport"} {
		file := filepath.Join(root, "usr/bin", p)
		if out, err := exec.Command(file, "--help").CombinedOutput(); err != nil {
			t.Errorf("%s --help: %v\n%s", p, err, out)
		}
		f, err := elf.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		if libs, err := f.ImportedLibraries(); err != nil || len(libs) > 0 {
			t.Errorf("%s wants %v %v", p, libs, err)
		}
		f.Close()
	}
}

// modes says how many files there are, none of which another user may write.
func modes(t *testing.T, root string) (n int) {
	for _, dir := range []string{"usr", "etc"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, e os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := e.Info()
			if err != nil {
				return err
			}
			if info.Mode().Perm()&0o022 != 0 || info.Mode()&(os.ModeSetuid|os.ModeSetgid) != 0 {
				t.Errorf("%s has mode %s", path, info.Mode())
			}
			if !e.IsDir() {
				n++
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// verify has systemd read a unit. What the unit starts lies in the root, which
// systemd is not to look at for units of its own.
func verify(t *testing.T, root, unit string) {
	t.Helper()
	b, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), filepath.Base(unit))
	if err := os.WriteFile(file, bytes.ReplaceAll(b, []byte("=/usr/bin/"), []byte("="+root+"/usr/bin/")), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := analyze("verify", "--man=no", "--recursive-errors=no", file); err != nil || len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("%v: %s", err, out)
	}
}

// exposure is what systemd thinks of a unit's hardening: 0 is best, 10 worst.
func exposure(t *testing.T, unit string) float64 {
	t.Helper()
	out, err := analyze("security", "--offline=true", "--no-pager", unit)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	m := regexp.MustCompile(`exposure level for \S+ ([0-9.]+)`).FindSubmatch(out)
	if m == nil {
		t.Fatalf("no exposure: %s", out)
	}
	n, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil || n > most {
		t.Errorf("the exposure of %s is %v, more than %v: %v\n%s", unit, n, most, err, out)
	}
	return n
}

func analyze(args ...string) ([]byte, error) {
	return exec.Command("systemd-analyze", args...).CombinedOutput()
}
