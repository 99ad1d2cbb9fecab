package manual

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"sallyport/policies"
)

// rest is what a configuration needs beside what a page shows of it.
var rest = map[string][]string{
	"issuer":  {"trust_domain: corp.example", "data_dir: /var/lib/sallyport/issuer", "listen: 127.0.0.1:8443", "policies: /etc/sallyport/policies"},
	"sidecar": {"trust_domain: corp.example", "data_dir: /var/lib/sallyport/payment", "issuer: {addresses: [\"127.0.0.1:8443\"], bundle: /etc/sallyport/bundle.pem, join_token: t}", "outbound: {listen: \"127.0.0.1:15001\"}"},
	"gateway": {"trust_domain: corp.example", "data_dir: /var/lib/sallyport/gateway", "issuer: {addresses: [\"127.0.0.1:8443\"], bundle: /etc/sallyport/bundle.pem, join_token: t}", "listen: 127.0.0.1:15443", "resolvers: [\"127.0.0.1:53\"]"},
}

var topKey = regexp.MustCompile(`(?m)^([a-z_.]+):`)

// config loads a configuration, or a policy file, as the program does that it
// is for.
func (r *reader) config(f fence) {
	r.t.Helper()
	r.tally.configs++
	text := whole(f.text)
	var keys []string
	for _, m := range topKey.FindAllStringSubmatch(text, -1) {
		keys = append(keys, m[1])
	}
	if len(keys) == 0 {
		r.errorf(f, f.line, "no configuration: no key at the start of a line")
		return
	}
	if name, text := policyFile(text, keys); name != "" {
		if err := r.lint(name, text); err != nil {
			r.errorf(f, f.line, "%v", err)
		}
		return
	}
	var errs []error
	for _, program := range []string{"issuer", "sidecar", "gateway", "injector"} {
		full := text
		for _, l := range rest[program] {
			if key, _, _ := strings.Cut(l, ":"); !slices.Contains(keys, key) && (key != "policies" || !strings.Contains(text, "source: pushed")) {
				full = l + "\n" + full
			}
		}
		if program != "issuer" {
			for key, value := range map[string]string{"addresses": `["127.0.0.1:8443"]`, "bundle": "/etc/sallyport/bundle.pem"} {
				full = complete(full, "issuer", key, value)
			}
			full = complete(full, "inbound", "app", "127.0.0.1:8080")
		}
		file := filepath.Join(r.t.TempDir(), program+".yaml")
		if err := os.WriteFile(file, []byte(full), 0o600); err != nil {
			r.t.Fatal(err)
		}
		out, err := exec.Command(filepath.Join(bin, program), "run", "--config", file, "--check-config").CombinedOutput()
		if err == nil {
			return
		}
		errs = append(errs, fmt.Errorf("%s: %w: %s", program, err, bytes.TrimSpace(out)))
	}
	r.errorf(f, f.line, "no program takes it:\n%v", errors.Join(errs...))
}

// complete adds a key to a section of a text that has the section without it.
func complete(text, section, key, value string) string {
	head, below, ok := strings.Cut("\n"+text, "\n"+section+":\n")
	if !ok || regexp.MustCompile(`(?m)^  `+key+`:`).MatchString(below) {
		return text
	}
	return head[min(1, len(head)):] + "\n" + section + ":\n  " + key + ": " + value + "\n" + below
}

// whole makes of a part that a page shows indented the file that it is of.
func whole(text string) string {
	lines := strings.Split(text, "\n")
	i := 0
	for i < len(lines)-1 && (strings.HasPrefix(strings.TrimSpace(lines[i]), "#") || lines[i] == "") {
		i++
	}
	first := lines[i]
	indent := len(first) - len(strings.TrimLeft(first, " "))
	route := "service: billing\nsubsets: [{name: v2, labels: {version: v2}}]\nroutes:\n  - name: all\n    backends: [{weight: 1}, {subset: v2, weight: 0}]\n"
	switch key := strings.TrimLeft(first, " "); {
	case indent == 6 && strings.HasPrefix(key, "steps:"):
		return route + "    rollout:\n      canary: {subset: v2}\n" + text
	case indent == 4 && strings.HasPrefix(key, "rollout:"):
		return route + strings.Replace(text, "    rollout:\n", "    rollout:\n      canary: {subset: v2}\n      steps: [{share: 100%, for: 1m}]\n", 1)
	case indent == 4 && strings.HasPrefix(key, "- name:"):
		return "audit:\n  sinks:\n" + text
	case indent == 0 && strings.HasPrefix(key, "selectors:"):
		return "entries:\n  - spiffe_id: spiffe://corp.example/ns/shop/sa/shown\n    parent_id: spiffe://corp.example/spire/agent/join_token/shown\n    " + text
	case indent == 0 && regexp.MustCompile(`^(routes|outlier|breaker|capacity|health|balance|retry_budget):`).MatchString(key):
		return "service: billing\n" + text
	}
	return text
}

// policyFile says which policy file a text is, if it is one.
func policyFile(text string, keys []string) (name, as string) {
	has := func(k string) bool { return slices.Contains(keys, k) }
	switch {
	case has("service"):
		return "routes/" + regexp.MustCompile(`(?m)^service: (\S+)`).FindStringSubmatch(text)[1] + ".yaml", text
	case has("access.csv"):
		return "modes.yaml", text
	case has("destinations"):
		return "egress.yaml", text
	case has("entries"):
		return "entries.yaml", text
	case has("services"):
		return "services.yaml", text
	case has("issuers"), has("api_keys"):
		return "tokens.yaml", text
	case has("tests"):
		return "tests/shown.yaml", text
	}
	return "", text
}

// rows checks rows of access.csv, or of admin.csv when they have six fields.
func (r *reader) rows(f fence) {
	r.t.Helper()
	r.tally.configs++
	name := "access.csv"
	for l := range strings.Lines(f.text) {
		if strings.HasPrefix(l, "p,") && strings.Count(l, ",") == 5 {
			name = "admin.csv"
		}
	}
	if err := r.lint(name, f.text); err != nil {
		r.errorf(f, f.line, "%v", err)
	}
}

// lint puts a file into the demo's policies, with the services that pages speak
// of, and has "policy lint" read them: a mistake ends it with 2, a remark with 1.
func (r *reader) lint(name, text string) error {
	dir := r.t.TempDir()
	td := "demo.sallyport"
	if strings.Contains(text, "corp.example") {
		td = "corp.example"
	}
	err := fs.WalkDir(policies.FS, ".", func(path string, e fs.DirEntry, err error) error {
		to := filepath.Join(dir, path)
		if err != nil || e.IsDir() {
			return errors.Join(err, os.MkdirAll(to, 0o700))
		}
		b, err := fs.ReadFile(policies.FS, path)
		if err != nil {
			return err
		}
		return os.WriteFile(to, bytes.ReplaceAll(b, []byte("demo.sallyport"), []byte(td)), 0o600)
	})
	if err != nil {
		return err
	}
	add := func(name, more string) {
		b, e := os.ReadFile(filepath.Join(dir, name))
		if e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
		err = errors.Join(err, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700), os.WriteFile(filepath.Join(dir, name), append(b, more...), 0o600))
	}
	if name != "services.yaml" {
		for _, s := range []string{"ledger", "ledger-next", "billing-next", "billing-b"} {
			add("services.yaml", fmt.Sprintf("  - {name: %s, identity: spiffe://%s/ns/shop/sa/%[1]s, port: 8443, protocol: http}\n", s, td))
		}
	}
	switch head, items, ok := strings.Cut(text, ":\n"); {
	case strings.HasPrefix(name, "routes/"):
		err = errors.Join(err, os.Remove(filepath.Join(dir, "routes", "billing.yaml")))
		add(name, text)
	case ok && slices.Contains([]string{"services.yaml", "entries.yaml", "egress.yaml"}, name):
		_ = head
		add(name, items)
	default:
		add(name, text)
	}
	if err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(bin, "sallyport"), "policy", "lint", dir, "--trust-domain", td)
	out, err := cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() == 1 {
		return nil
	}
	return fmt.Errorf("policy lint: %w: %s", err, bytes.TrimSpace(out))
}

// unit has systemd read a unit, with what pages leave out.
func (r *reader) unit(f fence) {
	r.t.Helper()
	r.tally.configs++
	kind := ".service"
	text := f.text
	switch {
	case strings.Contains(text, "[Socket]"):
		kind = ".socket"
		text = strings.Replace(text, "[Socket]", "[Unit]\nDescription=shown\n[Socket]", 1)
	case strings.Contains(text, "[Service]") && !strings.Contains(text, "ExecStart="):
		text = strings.Replace(text, "[Service]", "[Service]\nExecStart=/bin/true", 1)
	}
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		if os.Getenv("CI") != "" {
			r.errorf(f, f.line, "%v", err)
		}
		return
	}
	dir := r.t.TempDir()
	text = regexp.MustCompile(`/usr/bin/(issuer|sidecar|gateway)`).ReplaceAllString(text, bin+"/$1")
	text = regexp.MustCompile(`(?m)^(Requires|After|Wants|Before)=.*\n`).ReplaceAllString(text, "")
	file := filepath.Join(dir, "shown"+kind)
	service := "[Service]\nExecStart=/bin/true\n"
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "shown.service"), []byte(service), 0o600), os.WriteFile(file, []byte(text), 0o600)); err != nil {
		r.t.Fatal(err)
	}
	cmd := exec.Command("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", file)
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
	if out, err := cmd.CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
		r.errorf(f, f.line, "systemd-analyze verify: %v: %s", err, bytes.TrimSpace(out))
	}
}
