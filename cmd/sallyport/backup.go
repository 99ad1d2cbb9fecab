package main

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/archive"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
)

// The folders of a backup.
const (
	backupManifest = "manifest.json"
	backupConfig   = "config"
	backupState    = "state"
	backupDatabase = "issuer.db"
)

// A manifest says what a backup is, and where it belongs.
type manifest struct {
	Version     int       `json:"version"`
	Made        time.Time `json:"made"`
	TrustDomain string    `json:"trust_domain"`
	ConfigDir   string    `json:"config_dir"`
	DataDir     string    `json:"data_dir"`
	// Elsewhere is what belongs to it and is not in it.
	Elsewhere []string `json:"elsewhere,omitempty"`
}

// manifestVersion is raised when an older restore would misunderstand a backup.
const manifestVersion = 1

// backup is "sallyport backup".
func (c *cli) backup() *cobra.Command {
	var dir, to string
	var recipients []string
	cmd := &cobra.Command{
		Use: "backup --to FILE --recipient KEY", Short: "Copy what an issuer must not lose into an encrypted file", Args: cobra.NoArgs,
		Long: `Copy what the issuer on this machine must not lose into one file, encrypted by
age for each --recipient: its configuration and policies, its CA keys, and its
database as it is at one moment. The issuer may run.

Not in it are audit records (docs/audit.md says where else they go), a database
that is PostgreSQL, and keys that a PKCS#11 token has; the command names them.
A key for it: sallyport archive keygen. Restore it: sallyport restore.`,
		Example: "  sallyport backup --to issuer.age --recipient age1...",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if to == "" || len(recipients) == 0 {
				return usage(errors.New("--to and --recipient are needed: where the backup goes, and who can read it"))
			}
			all, err := findInstalled(cmd.Context(), dir)
			if err != nil {
				return err
			}
			if all[0].program != issuerProgram {
				return usage(fmt.Errorf("no issuer.yaml is in %s: nodes need no backup, they join again", dir))
			}
			if err := all[0].err; err != nil {
				return daemon.Exit(daemon.Failed, err)
			}
			m, err := backUp(cmd.Context(), all[0], to, recipients)
			if err != nil {
				return daemon.Exit(daemon.Failed, err)
			}
			for _, what := range m.Elsewhere {
				fmt.Fprintf(c.stderr, "not in it: %s\n", what)
			}
			if c.format == "json" {
				return c.emit(m, nil, nil)
			}
			fmt.Fprintf(c.stdout, "%s has the issuer of %s\n", to, m.TrustDomain)
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", defaultDir, "the directory of the configuration")
	cmd.Flags().StringVar(&to, "to", "", "the file to write, which must not be there")
	cmd.Flags().StringArrayVar(&recipients, "recipient", nil, "public key of age, of who can read it; may be repeated")
	return cmd
}

// backUp writes the whole file, or none.
func backUp(ctx context.Context, i *installed, to string, recipients []string) (m manifest, err error) {
	if err := i.atRest(ctx); err != nil {
		return m, err
	}
	dir, err := filepath.Abs(filepath.Dir(i.config))
	if err != nil {
		return m, err
	}
	if abs, err := filepath.Abs(to); err != nil || strings.HasPrefix(abs, dir+"/") || strings.HasPrefix(abs, i.DataDir+"/") {
		return m, errors.Join(err, fmt.Errorf("%s is within what is backed up; write it elsewhere, and take it off this machine", to))
	}
	m = manifest{Version: manifestVersion, Made: time.Now().UTC().Truncate(time.Second), TrustDomain: i.TrustDomain, ConfigDir: dir, DataDir: i.DataDir, Elsewhere: i.elsewhere()}
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return m, err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			os.Remove(to)
		}
	}()
	sealed, err := archive.Seal(f, recipients...)
	if err != nil {
		return m, err
	}
	b := &packer{tar.NewWriter(sealed)}
	text, err := json.Marshal(m)
	if err != nil {
		return m, err
	}
	err = b.bytes(backupManifest, text)
	if err == nil && i.Database.URL == "" {
		err = b.database(ctx, i)
	}
	if err == nil {
		err = b.folder(i.DataDir, backupState, notKept)
	}
	if err == nil {
		err = b.folder(dir, backupConfig, func(string) bool { return false })
	}
	return m, errors.Join(err, b.Close(), sealed.Close(), f.Sync())
}

// atRest refuses the time between two steps of replacing the root.
func (i *installed) atRest(ctx context.Context) error {
	if _, err := i.pid(); err != nil {
		return nil //nolint:nilerr // an issuer that does not run takes no step
	}
	phase, err := i.phase(ctx)
	if err != nil {
		return err
	}
	if phase != "steady" {
		return daemon.Hint(fmt.Errorf("the root is being replaced (%s): a backup of now could trust one that is withdrawn tomorrow", phase), "sallyport ca status, and then again")
	}
	return nil
}

// phase is how far the running issuer is with replacing its root; steady while
// it is not.
func (i *installed) phase(ctx context.Context) (phase string, err error) {
	err = i.manage(ctx, func(ctx context.Context, a *control.Admin) error {
		st, err := a.Roots(ctx)
		phase = st.Phase
		return err
	})
	return phase, err
}

// elsewhere is what of an issuer no backup of its directories has.
func (i *installed) elsewhere() (out []string) {
	if i.Database.URL != "" {
		out = append(out, "the database, which is PostgreSQL: pg_dump it at the same time, by the URL of database.url")
	}
	if i.CA.KMS != "" {
		out = append(out, "the CA keys, which are where ca.kms says: back up that token by its own means")
	}
	dir, _ := filepath.Abs(filepath.Dir(i.config))
	inside := func(p string) bool {
		return p == "" || strings.HasPrefix(p, dir+"/") || strings.HasPrefix(p, i.DataDir+"/")
	}
	for field, p := range map[string]string{"policies": i.Policies, "ca.passphrase_file": i.CA.PassphraseFile, "ca.upstream.key_file": i.CA.Upstream.KeyFile} {
		if !inside(p) {
			out = append(out, fmt.Sprintf("%s: %s is outside of %s", field, p, dir))
		}
	}
	slices.Sort(out)
	return append(out, "audit records")
}

// notKept names what of the issuer's state a backup leaves out: logs, sockets,
// and the files of the database, of which there is a copy.
func notKept(name string) bool {
	top, _, _ := strings.Cut(name, "/")
	return top == "run" || top == "received" || strings.HasPrefix(top, "audit") || strings.HasPrefix(top, backupDatabase) || strings.HasPrefix(top, ".")
}

// A packer puts files into a tar.
type packer struct{ *tar.Writer }

func (b *packer) bytes(name string, text []byte) error {
	if err := b.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(text)), Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	_, err := b.Write(text)
	return err
}

// database copies that of the issuer by the issuer's own means.
func (b *packer) database(ctx context.Context, i *installed) error {
	tmp, err := os.MkdirTemp(i.DataDir, ".backup-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	copied := filepath.Join(tmp, backupDatabase)
	if out, err := exec.CommandContext(ctx, i.path, "store", "copy", copied, "--config", i.config).CombinedOutput(); err != nil {
		return fmt.Errorf("copy the database: %s", strings.TrimSpace(string(out)))
	}
	db := filepath.Join(i.DataDir, backupDatabase)
	st, err := os.Stat(db) // whose it is
	if err != nil {
		return err
	}
	return b.file(copied, path.Join(backupState, backupDatabase), st)
}

// folder packs the regular files of a directory.
func (b *packer) folder(dir, as string, skip func(name string) bool) error {
	return filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil || rel == "." {
			return err
		}
		name := filepath.ToSlash(rel)
		switch {
		case skip(name) && e.IsDir():
			return filepath.SkipDir
		case skip(name) || e.IsDir():
			return nil
		case !e.Type().IsRegular():
			if e.Type()&fs.ModeSymlink != 0 {
				return fmt.Errorf("%s is a symbolic link, which a backup does not follow; put the file itself there", p)
			}
			return nil
		}
		st, err := e.Info()
		if err != nil {
			return err
		}
		return b.file(p, path.Join(as, name), st)
	})
}

// file packs one, with the mode and the owner of st.
func (b *packer) file(p, name string, st fs.FileInfo) error {
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	own, err := f.Stat()
	if err != nil {
		return err
	}
	h := &tar.Header{Name: name, Mode: int64(st.Mode().Perm()), Size: own.Size(), ModTime: st.ModTime(), Typeflag: tar.TypeReg, Uid: int(ownerOf(st)), Gid: int(groupOf(st))}
	if err := b.WriteHeader(h); err != nil {
		return err
	}
	n, err := io.Copy(b, io.LimitReader(f, own.Size()))
	if err == nil && n != own.Size() {
		err = fmt.Errorf("%s became shorter while it was read", p)
	}
	return err
}
