package main

import (
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestCodesAreDocumented holds the pages to the lists of checks, both ways and in
// order, and lets no page speak of a code that there is not.
func TestCodesAreDocumented(t *testing.T) {
	doctor, upgrade := "", ""
	known := map[string]bool{}
	for _, c := range doctorChecks() {
		doctor += c.code + " " + c.name + "\n"
		known[c.code] = true
	}
	for _, c := range upgradeChecks() {
		upgrade += c.code + " " + c.name + "\n"
		known[c.code] = true
	}
	if want := len(doctorChecks()) + len(upgradeChecks()); len(known) != want {
		t.Errorf("%d checks have %d codes", want, len(known))
	}
	row := regexp.MustCompile(`(?m)^\| ((?:SP|UP)\d+) \| ([^|]+) \|`)
	for page, want := range map[string]string{"doctor.md": doctor, "operate.md": upgrade} {
		b, err := os.ReadFile("../../docs/" + page)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, m := range row.FindAllStringSubmatch(string(b), -1) {
			got += m[1] + " " + m[2] + "\n"
		}
		if got != want {
			t.Errorf("docs/%s documents:\n%swhere there are:\n%s", page, got, want)
		}
	}
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatalf("%v, %v", pages, err)
	}
	for _, page := range pages {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, code := range regexp.MustCompile(`\b(?:SP|UP)\d{3}\b`).FindAllString(string(b), -1) {
			if !known[code] {
				t.Errorf("%s speaks of %s, which there is not", page, code)
			}
		}
	}
}

// TestDoctorFinds harms one thing after another.
func TestDoctorFinds(t *testing.T) {
	root := t.TempDir()
	data := filepath.Join(root, "data")
	fresh := func() *installed {
		i := &installed{program: sidecarProgram, config: filepath.Join(root, "sidecar.yaml")}
		i.TrustDomain, i.DataDir, i.RunDir = "corp.example", data, filepath.Join(data, "run")
		i.Issuer.Addresses = []string{"127.0.0.1:1"}
		i.Issuer.Bundle = filepath.Join(root, "bundle.pem")
		i.Issuer.JoinTokenFile = filepath.Join(root, "join-token")
		return i
	}
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	put := func(name, text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(root, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(root, name), mode); err != nil {
			t.Fatal(err)
		}
	}
	put("join-token", "x", 0o600)
	for _, tt := range []struct {
		name string
		code string
		harm func(i *installed)
		want string
		says string
	}{
		{"a directory that is its own", "SP004", func(*installed) {}, stateOK, ""},
		{"a directory that lets others in", "SP004", func(*installed) { _ = os.Chmod(data, 0o750) }, stateFail, "chmod 700 " + data},
		{"a directory that is not there", "SP004", func(i *installed) { i.DataDir += "x" }, stateFail, "data_dir"},
		{"secrets that are closed", "SP005", func(*installed) {}, stateOK, "1 file"},
		{"a token that others may read", "SP005", func(*installed) { put("join-token", "x", 0o640) }, stateFail, "chmod 600"},
		{"nothing runs", "SP006", func(*installed) {}, stateFail, "sidecar run --config"},
		{"nothing says that it is ready", "SP008", func(*installed) {}, stateSkip, ""},
		{"a bundle that is not there", "SP010", func(*installed) {}, stateFail, "bundle.pem"},
		{"a bundle that is none", "SP010", func(*installed) { put("bundle.pem", "hello", 0o644) }, stateFail, "CERTIFICATE"},
		{"no SVID", "SP012", func(*installed) {}, stateFail, "sallyport entry list"},
		{"nobody is captured", "SP014", func(*installed) {}, stateSkip, ""},
		{"a port that is taken", "SP009", func(i *installed) { i.Outbound.Listen = listener(t) }, stateFail, "outbound.listen"},
		{"a port that is free", "SP009", func(i *installed) { i.Outbound.Listen = "127.0.0.1:1" }, stateOK, ""},
		{"a spool larger than the disk", "SP017", func(i *installed) { i.Audit.Spool.MaxBytes = 1 << 60 }, stateWarn, "audit.spool.max_bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i := fresh()
			tt.harm(i)
			defer func() { _ = os.Chmod(data, 0o700) }()
			for _, c := range doctorChecks() {
				if c.code != tt.code {
					continue
				}
				got := c.look(t.Context(), &examination{all: []*installed{i}, now: time.Now()}, i)
				if got.State != tt.want || !strings.Contains(got.Detail+" "+got.Fix, tt.says) {
					t.Errorf("%s: %+v, want %s and %q", c.code, got, tt.want, tt.says)
				}
				if (got.State == stateFail || got.State == stateWarn) != (got.Fix != "") {
					t.Errorf("%s: %+v: what to do is said when something is amiss, and only then", c.code, got)
				}
			}
		})
	}
}

// listener gives an address on which this test listens.
func listener(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln.Addr().String()
}
