package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// A scrubber takes secrets out of a text: those that it was told, and what
// looks like one.
type scrubber struct{ known []string }

// removed stands where a secret was.
const removed = "[removed]"

// secretForms match secrets by their form: private keys, tokens of ours and of
// others, long numbers in hex (join tokens, and with them hashes), passwords in
// URLs, and the values of fields that are named for a secret.
var secretForms = []*regexp.Regexp{
	regexp.MustCompile(`(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)`),
	regexp.MustCompile(`AGE-SECRET-KEY-1[0-9A-Za-z]+`),
	regexp.MustCompile(invitationBegins + `[A-Za-z0-9_-]+`),
	regexp.MustCompile(`eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]*)*`),
	regexp.MustCompile(`\b[0-9a-fA-F]{48,}\b`),
	regexp.MustCompile(`[A-Za-z0-9+/_-]{100,}={0,2}`), // keys in base64
}

var (
	secretURL   = regexp.MustCompile(`(://[^/\s:@"]*):[^/\s@"]+@`)
	secretField = regexp.MustCompile(`(?i)(\b(?:authorization|proxy-authorization|cookie|set-cookie|x-api-key|password|passphrase|secret|client_secret|api_key|join_token|pin)"?\s*[:=]\s*)("[^"]*"|[^\s,}]+)`)
)

// learn adds what a file holds, line by line.
func (s *scrubber) learn(file string) {
	b, err := os.ReadFile(file)
	if err != nil || bytes.IndexByte(b, 0) >= 0 || len(b) > 1<<20 {
		return
	}
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); len(line) >= 8 && !strings.HasPrefix(line, "-----") {
			s.known = append(s.known, line)
		}
	}
}

func (s *scrubber) scrub(text string) string {
	for _, k := range s.known {
		text = strings.ReplaceAll(text, k, removed)
	}
	for _, f := range secretForms {
		text = f.ReplaceAllString(text, removed)
	}
	text = secretURL.ReplaceAllString(text, "$1:"+removed+"@")
	return secretField.ReplaceAllString(text, "$1"+removed)
}

// bugReport is "sallyport bug-report".
func (c *cli) bugReport() *cobra.Command {
	var dir, to string
	cmd := &cobra.Command{
		Use: "bug-report", Short: "Gather what a person needs to help, without secrets", Args: cobra.NoArgs,
		Long: `Gather what a person needs to help into one file (tar, gzip): the versions, what
the doctor finds, and of each program its configuration with secrets masked, its
readiness, its metrics, and the names, modes and sizes of its files. No key, no
token, no body of a call, and no audit record is in it. Identities, addresses
and names of services are: look at it before you give it away.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := findInstalled(cmd.Context(), dir)
			if err != nil {
				return err
			}
			if to == "" {
				to = "sallyport-bug-report-" + time.Now().UTC().Format("20060102-150405") + ".tar.gz"
			}
			if err := writeReport(cmd.Context(), all, to); err != nil {
				return failed(err)
			}
			if c.format == "json" {
				return c.emit(map[string]string{"file": to}, nil, nil)
			}
			fmt.Fprintf(c.stdout, "%s\nlook at it before you give it away: tar tzf %s\n", to, to)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", defaultDir, "the directory of the configurations")
	cmd.Flags().StringVar(&to, "write", "", "the file to write, which must not be there (default: a name with the time)")
	return cmd
}

func writeReport(ctx context.Context, all []*installed, to string) (err error) {
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			os.Remove(to)
		}
	}()
	var s scrubber
	for _, i := range all {
		if files, err := i.secrets(); err == nil && i.err == nil {
			for _, f := range files {
				s.learn(f)
			}
		}
	}
	z := gzip.NewWriter(f)
	t := &packer{tar.NewWriter(z)}
	for _, part := range reportOf(ctx, all) {
		if err := t.bytes("bug-report/"+part.name, []byte(s.scrub(part.text))); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), z.Close())
}

// A part is one file of a report.
type part struct{ name, text string }

// reportOf gathers everything, secrets included as far as programs tell any.
func reportOf(ctx context.Context, all []*installed) (parts []part) {
	add := func(name, text string) { parts = append(parts, part{name, text}) }
	r := (&examination{all: all, now: time.Now()}).examine(ctx)
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		b = []byte(err.Error())
	}
	add("doctor.json", string(b))
	add("machine.txt", machine())
	own, err := os.Executable()
	if err == nil {
		own, err = buildOf(own)
	}
	versions := fmt.Sprintln("sallyport", own, errText(err))
	for _, i := range all {
		v, err := buildOf(i.path)
		versions += fmt.Sprintln(i.name(), v, errText(err))
		at := func(name string) string { return i.name() + "/" + name }
		if i.err != nil {
			add(at("error.txt"), i.err.Error())
			continue
		}
		out, err := exec.CommandContext(ctx, i.path, "config", "show", "--config", i.config).CombinedOutput()
		add(at("config.yaml"), string(out)+errText(err))
		add(at("files.txt"), listing(i.DataDir))
		for _, path := range []string{"/readyz", "/metrics", "/troubles", "/identity"} {
			status, body, err := i.get(ctx, path)
			if status == 404 {
				continue
			}
			add(at(strings.TrimPrefix(path, "/")+".txt"), string(body)+errText(err))
		}
	}
	add("versions.txt", versions)
	return parts
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// machine says on what all this runs.
func machine() string {
	var b strings.Builder
	for _, f := range []string{"/proc/version", "/proc/loadavg", "/proc/uptime", "/etc/os-release"} {
		text, err := os.ReadFile(f)
		fmt.Fprintf(&b, "%s: %s%s\n", f, text, errText(err))
	}
	if text, err := os.ReadFile("/proc/meminfo"); err == nil {
		lines := strings.SplitN(string(text), "\n", 4)
		fmt.Fprintln(&b, strings.Join(lines[:min(3, len(lines))], "\n"))
	}
	return b.String()
}

// listing has the names, modes and sizes below a directory.
func listing(dir string) string {
	var b strings.Builder
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := e.Info()
		if err != nil {
			return nil //nolint:nilerr // it has gone meanwhile
		}
		fmt.Fprintf(&b, "%s %d %d %s %s\n", st.Mode(), ownerOf(st), st.Size(), stamp(st.ModTime()), strings.TrimPrefix(p, dir))
		return nil
	})
	return b.String() + errText(err)
}
