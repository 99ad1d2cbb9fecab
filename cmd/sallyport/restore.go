package main

import (
	"archive/tar"
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/internal/archive"
	"sallyport/internal/daemon"
)

// restore is "sallyport restore".
func (c *cli) restore() *cobra.Command {
	var keys []string
	var into string
	cmd := &cobra.Command{
		Use: "restore FILE --key KEY-FILE", Short: "Put an issuer back from a backup", Args: cobra.ExactArgs(1),
		Long: `Put back what "sallyport backup" wrote: configuration and policies, CA keys and
database, where they were. Those directories must not be there, or be empty;
all is put back or nothing. As root the files get the owners that they had.

The issuer goes on where the backup was made: nodes that joined later join
again, and what was revoked later is to be revoked again. Start no second issuer
beside one that runs.`,
		Example: "  sallyport restore issuer.age --key backup.key",
		RunE: func(_ *cobra.Command, args []string) error {
			if len(keys) == 0 {
				return usage(errors.New("--key is needed: the file of the private key of a recipient, as sallyport archive keygen writes it"))
			}
			m, dirs, err := restoreFrom(args[0], keys, into)
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
	cmd.Flags().StringVar(&into, "into", "", "put everything below this directory instead, to look at it")
	return cmd
}

// mostRestored bounds what one file of a backup may have: far above any
// database of an issuer.
const mostRestored = 16 << 30

// restoreFrom puts a backup back, wholly or not at all, and says where it is.
func restoreFrom(file string, keys []string, into string) (m manifest, dirs []string, err error) {
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
	places := []*place{{name: backupConfig, dir: filepath.Join(into, m.ConfigDir), mode: 0o755}, {name: backupState, dir: filepath.Join(into, m.DataDir), mode: 0o700}}
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
		dirs = append(dirs, p.dir)
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

// A place is a directory to be put back, made beside it first.
type place struct {
	name, dir string
	mode      fs.FileMode
	tmp       string
	done      bool
}

// begin makes the directory beside, in the same file system.
func (p *place) begin() error {
	if list, err := os.ReadDir(p.dir); err == nil && len(list) > 0 {
		return daemon.Hint(fmt.Errorf("%s is not empty, and nothing was put back", p.dir), "move it away, or look at the backup with --into DIR")
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	above := filepath.Dir(p.dir)
	if err := os.MkdirAll(above, 0o755); err != nil {
		return err
	}
	var err error
	p.tmp, err = os.MkdirTemp(above, "."+filepath.Base(p.dir)+".restoring-")
	return err
}

// put writes a file and gives it the owner that it had, if this user may.
func (p *place) put(r io.Reader, name string, h *tar.Header) error {
	to := filepath.Join(p.tmp, name)
	if err := os.MkdirAll(filepath.Dir(to), p.mode); err != nil {
		return err
	}
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	err = errors.Join(err, f.Chmod(fs.FileMode(h.Mode).Perm()))
	if os.Geteuid() == 0 {
		err = errors.Join(err, f.Chown(h.Uid, h.Gid))
		for dir := filepath.Dir(to); p.name == backupState && len(dir) >= len(p.tmp); dir = filepath.Dir(dir) {
			err = errors.Join(err, os.Chown(dir, h.Uid, h.Gid))
		}
	}
	return errors.Join(err, f.Sync(), f.Close())
}

// finish puts the directory in its place.
func (p *place) finish() error {
	if err := os.Chmod(p.tmp, p.mode); err != nil {
		return err
	}
	if err := os.Remove(p.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(p.tmp, p.dir); err != nil {
		return err
	}
	p.done = true
	return nil
}

// discard takes away what is not to stay.
func (p *place) discard(failed bool) {
	if p.tmp != "" && !p.done {
		_ = os.RemoveAll(p.tmp)
	}
	if failed && p.done {
		_ = os.RemoveAll(p.dir)
	}
}
