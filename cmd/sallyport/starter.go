package main

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"text/template"

	"sallyport/internal/daemon"
)

// starterFS has the configuration files with which a trust domain and a node
// begin.
//
//go:embed starter
var starterFS embed.FS

// starter is what they are filled with.
type starter struct {
	TrustDomain string
	Agent       string // of a node
	Dir, Data   string // where configuration and state are
	Run         string // where the issuer's sockets are
	Listen      string
	Issuer      string // as one proxy dials it
	Issuers     string // as a list of YAML
	Resolvers   string // as a list of YAML
	Outbound    string

	App, Inbound, Advertise string // empty when nobody calls the workload
}

// render fills one file.
func (s starter) render(name string) ([]byte, error) {
	t, err := template.ParseFS(starterFS, "starter/"+name)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := t.Option("missingkey=error").Execute(&b, s); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// plainPath matches paths that mean themselves in YAML and in a shell.
var plainPath = regexp.MustCompile(`^/[A-Za-z0-9/._+-]*$`)

// absolute is a directory of a flag, as it goes into configuration files.
func absolute(flag, dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", usage(fmt.Errorf("%s: %w", flag, err))
	}
	if !plainPath.MatchString(abs) {
		return "", usage(fmt.Errorf("%s: %q: use a path of letters, digits, '.', '_', '+' and '-'", flag, abs))
	}
	return abs, nil
}

// A newFile is one that must not be there yet.
type newFile struct {
	path string
	data []byte
	mode fs.FileMode
}

// newFiles are written all or none. Directories they need are made, open to
// be read; those in closed are made for their owner alone.
type newFiles struct {
	dir    string // has all files
	files  []newFile
	closed []string
	owner  *user.User // nil: this user
}

// write refuses to replace anything.
func (n *newFiles) write() (err error) {
	for _, f := range n.files {
		if _, err := os.Lstat(f.path); err == nil {
			return daemon.Hint(daemon.Exit(daemon.Failed, fmt.Errorf("%s is there already, and nothing was written", f.path)), "move it away, or name another directory with --dir")
		} else if !errors.Is(err, fs.ErrNotExist) {
			return daemon.Exit(daemon.Failed, err)
		}
	}
	m := making{uid: -1, gid: -1}
	if n.owner != nil {
		var errU, errG error
		m.uid, errU = strconv.Atoi(n.owner.Uid)
		m.gid, errG = strconv.Atoi(n.owner.Gid)
		if err := errors.Join(errU, errG); err != nil {
			return daemon.Exit(daemon.Failed, err)
		}
	}
	defer func() { m.end(err != nil) }()
	for _, dir := range n.closed {
		if _, err := m.open(dir, 0o700); err != nil {
			return err
		}
	}
	in, err := m.open(n.dir, 0o755)
	if err != nil {
		return err
	}
	for _, f := range n.files {
		name, err := filepath.Rel(n.dir, f.path)
		if err == nil {
			err = m.mkdir(in, filepath.Dir(name), 0o755)
		}
		if err == nil {
			err = m.write(in, name, f.data, f.mode)
		}
		if err != nil {
			return daemon.Exit(daemon.Failed, fmt.Errorf("write %s: %w", f.path, err))
		}
	}
	return daemon.Exit(daemon.Failed, m.give())
}

// ownedBy looks up who is to own what is written; nobody named is this user.
func (n *newFiles) ownedBy(name string) (err error) {
	if name == "" {
		return nil
	}
	if n.owner, err = user.Lookup(name); err != nil {
		return usage(fmt.Errorf("--user: %w", err))
	}
	return nil
}
