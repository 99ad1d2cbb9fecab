package main

import (
	"archive/tar"
	"bufio"
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/internal/archive"
	"sallyport/internal/daemon"
)

// restore is "sallyport restore".
func (c *cli) restore() *cobra.Command {
	var keys []string
	var to destination
	cmd := &cobra.Command{
		Use: "restore FILE --key KEY-FILE", Short: "Put an issuer back from a backup", Args: cobra.ExactArgs(1),
		Long: `Put back what "sallyport backup" wrote: configuration and policies, CA keys and
database, where they were. Those directories must not be there, or be empty;
all is put back or nothing. As root the files get the owners that they had.
Whoever has the public key can make such a file: a backup that belongs elsewhere
than --dir and --data is refused, and no file may be written by others or run.

The issuer goes on where the backup was made: nodes that joined later join
again, and what was revoked later is to be revoked again. Start no second issuer
beside one that runs.`,
		Example: "  sallyport restore issuer.age --key backup.key",
		RunE: func(_ *cobra.Command, args []string) error {
			if len(keys) == 0 {
				return usage(errors.New("--key is needed: the file of the private key of a recipient, as sallyport archive keygen writes it"))
			}
			if to.into != "" && (to.config != "" || to.data != "") {
				return usage(errors.New("--into goes without --dir and --data"))
			}
			m, dirs, err := restoreFrom(args[0], keys, to)
			if err != nil {
				return daemon.Exit(daemon.Failed, err)
			}
			if c.format == "json" {
				return c.emit(m, nil, nil)
			}
			fmt.Fprintf(c.stdout, "%s as it was at %s:\n  %s\n", m.TrustDomain, stamp(m.Made), strings.Join(dirs, "\n  "))
			for _, what := range m.Elsewhere {
				fmt.Fprintf(c.stdout, "not in it: %s\n", what)
			}
			fmt.Fprintf(c.stdout, "\nnext:\n  issuer run --config %s\n", filepath.Join(dirs[0], "issuer.yaml"))
			return nil
		},
	}
	cmd.Flags().StringArrayVarP(&keys, "key", "i", nil, "file with a private key of age; may be repeated")
	cmd.Flags().StringVar(&to.config, "dir", "", "the directory of the configuration (default: "+defaultDir+")")
	cmd.Flags().StringVar(&to.data, "data", "", "the directory of the issuer's state (default: "+filepath.Join(defaultData, "issuer")+")")
	cmd.Flags().StringVar(&to.into, "into", "", "put everything below this directory instead, to look at it")
	return cmd
}

// A destination is where the operator lets a backup go.
type destination struct{ config, data, into string }

// places are the two directories of a backup, if the operator agrees: age says
// who can read it, and not who made it.
func (d destination) places(m manifest) ([]*place, error) {
	if d.into != "" {
		if abs, err := filepath.Abs(d.into); err != nil || abs == "/" {
			return nil, errors.Join(err, errors.New("--into: name a directory below the root"))
		}
		if err := os.MkdirAll(d.into, 0o700); err != nil {
			return nil, err
		}
	} else {
		var errC, errD error
		d.config, errC = filepath.Abs(cmp.Or(d.config, defaultDir))
		d.data, errD = filepath.Abs(cmp.Or(d.data, filepath.Join(defaultData, "issuer")))
		if err := errors.Join(errC, errD); err != nil {
			return nil, err
		}
		if m.ConfigDir != d.config || m.DataDir != d.data {
			return nil, daemon.Hint(fmt.Errorf("the backup belongs into %s and %s, not into %s and %s, and nothing was put back", m.ConfigDir, m.DataDir, d.config, d.data),
				fmt.Sprintf("if that is where this issuer was: --dir %s --data %s; else look at it with --into DIR", m.ConfigDir, m.DataDir))
		}
	}
	return []*place{
		{name: backupConfig, below: d.into, dir: m.ConfigDir, mode: 0o755},
		{name: backupState, below: d.into, dir: m.DataDir, mode: 0o700},
	}, nil
}

// mostRestored bounds what one file of a backup may have: far above any
// database of an issuer.
const mostRestored = 16 << 30

// restoreFrom puts a backup back, wholly or not at all, and says where it is.
func restoreFrom(file string, keys []string, to destination) (m manifest, dirs []string, err error) {
	ids, err := archive.ReadIdentities(keys...)
	if err != nil {
		return m, nil, err
	}
	f, err := os.Open(file)
	if err != nil {
		return m, nil, err
	}
	defer f.Close()
	plain, err := archive.Unseal(bufio.NewReader(f), ids)
	if err != nil {
		return m, nil, fmt.Errorf("%s: %w", file, err)
	}
	r := tar.NewReader(plain)
	if m, err = readManifest(r); err != nil {
		return m, nil, fmt.Errorf("%s: %w", file, err)
	}
	places, err := to.places(m)
	if err != nil {
		return m, nil, err
	}
	defer func() {
		for _, p := range places {
			p.discard(err != nil)
		}
	}()
	for _, p := range places {
		if err := p.begin(); err != nil {
			return m, nil, err
		}
	}
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return m, nil, fmt.Errorf("%s: %w", file, err)
		}
		if err := unpack(r, h, places); err != nil {
			return m, nil, fmt.Errorf("%s: %w", file, err)
		}
	}
	// The end of the encryption, after that of the tar.
	if _, err := io.Copy(io.Discard, plain); err != nil {
		return m, nil, fmt.Errorf("%s: %w", file, err)
	}
	for _, p := range places {
		if err := p.finish(); err != nil {
			return m, nil, err
		}
		dirs = append(dirs, filepath.Join(p.below, p.dir))
	}
	return m, dirs, nil
}

func readManifest(r *tar.Reader) (m manifest, err error) {
	h, err := r.Next()
	if err != nil {
		return m, err
	}
	if h.Name != backupManifest || h.Size > 1<<20 {
		return m, errors.New("it is no backup of sallyport")
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("%s: %w", backupManifest, err)
	}
	if m.Version != manifestVersion {
		return m, fmt.Errorf("it has version %d, this program knows %d: use the program of the time of the backup", m.Version, manifestVersion)
	}
	for _, dir := range []string{m.ConfigDir, m.DataDir} {
		if !plainPath.MatchString(dir) || dir != filepath.Clean(dir) || dir == "/" {
			return m, fmt.Errorf("it belongs into %q, which is no plain absolute path", dir)
		}
	}
	return m, nil
}

// unpack writes one file into the place that its name begins with.
func unpack(r io.Reader, h *tar.Header, places []*place) error {
	top, rest, _ := strings.Cut(h.Name, "/")
	for _, p := range places {
		if p.name != top {
			continue
		}
		if h.Typeflag != tar.TypeReg || !filepath.IsLocal(rest) || h.Size > mostRestored {
			return fmt.Errorf("%q is no file that a backup has", h.Name)
		}
		return p.put(r, rest, h)
	}
	return fmt.Errorf("%q is in no folder of a backup", h.Name)
}

// A place is a directory to be put back, made beside it first. Until it is
// whole it is this user's alone, and everything goes through open directories
// that no link leads out of.
type place struct {
	name  string
	below string // of what dir is to be; empty: of the root
	dir   string
	mode  fs.FileMode
	above *os.Root // has tmp, and then dir
	tmp   string
	in    *os.Root // is tmp
	files []restored
	done  bool
}

type restored struct {
	name     string
	uid, gid int
}

// begin makes the directory beside, in the same file system.
func (p *place) begin() (err error) {
	if p.above, err = openAbove(cmp.Or(p.below, "/"), filepath.Dir(p.dir)[1:]); err != nil {
		return err
	}
	if d, err := p.above.Open(filepath.Base(p.dir)); err == nil {
		list, err := d.Readdirnames(1)
		d.Close()
		if len(list) > 0 {
			return daemon.Hint(fmt.Errorf("%s is not empty, and nothing was put back", filepath.Join(p.below, p.dir)), "move it away, or look at the backup with --into DIR")
		} else if err != io.EOF {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	p.tmp = "." + filepath.Base(p.dir) + ".restoring-" + strings.ToLower(rand.Text())
	if err := p.above.Mkdir(p.tmp, 0o700); err != nil {
		return err
	}
	p.in, err = p.above.OpenRoot(p.tmp)
	return err
}

// openAbove opens a directory below another, and makes what is missing of it.
// Below the root it goes by the links of the machine, such as /var to elsewhere.
func openAbove(below, name string) (*os.Root, error) {
	if below == "/" {
		dir := filepath.Join(below, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		return os.OpenRoot(dir)
	}
	r, err := os.OpenRoot(below)
	if err != nil || name == "" {
		return r, err
	}
	defer r.Close()
	if err := r.MkdirAll(name, 0o755); err != nil {
		return nil, err
	}
	return r.OpenRoot(name)
}

// put writes a file. Whose it will be is for the end: into what belongs to
// another, root writes nothing.
func (p *place) put(r io.Reader, name string, h *tar.Header) error {
	if err := p.in.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := p.in.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	p.files = append(p.files, restored{name, h.Uid, h.Gid})
	_, err = io.Copy(f, r)
	// An issuer has no file that others write, and none that is run.
	return errors.Join(err, f.Chmod(fs.FileMode(h.Mode)&0o644), f.Sync(), f.Close())
}

// finish puts the directory in its place.
func (p *place) finish() error {
	if err := p.hand(); err != nil {
		return err
	}
	base := filepath.Base(p.dir)
	if err := p.above.Remove(base); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := p.above.Rename(p.tmp, base); err != nil {
		return err
	}
	p.done = true
	return onDirectory(p.above, ".", (*os.File).Sync)
}

// hand gives what is in it to whom it belonged, if this user may, and opens the
// directories as they are to be: what is within a directory before itself.
func (p *place) hand() error {
	root, of := os.Geteuid() == 0, restored{uid: -1}
	seen := map[string]bool{}
	for _, f := range p.files {
		for dir := filepath.Dir(f.name); dir != "."; dir = filepath.Dir(dir) {
			seen[dir] = true
		}
		if root {
			if err := p.in.Lchown(f.name, f.uid, f.gid); err != nil {
				return err
			}
			of = f
		}
	}
	// A longer path is never above a shorter one.
	dirs := slices.SortedFunc(maps.Keys(seen), func(a, b string) int { return len(b) - len(a) })
	for _, dir := range append(dirs, ".") {
		err := onDirectory(p.in, dir, func(d *os.File) error {
			err := errors.Join(d.Chmod(p.mode), d.Sync())
			if root && p.name == backupState && of.uid >= 0 {
				err = errors.Join(err, d.Chown(of.uid, of.gid))
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// discard takes away what is not to stay.
func (p *place) discard(failed bool) {
	if p.above == nil {
		return
	}
	if p.tmp != "" && !p.done {
		_ = p.above.RemoveAll(p.tmp)
	}
	if failed && p.done {
		_ = p.above.RemoveAll(filepath.Base(p.dir))
	}
	if p.in != nil {
		_ = p.in.Close()
	}
	_ = p.above.Close()
}
