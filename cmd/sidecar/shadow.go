package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"

	"sallyport/internal/archive"
	"sallyport/internal/audit"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/proxy"
	"sallyport/internal/shadow"
	"sallyport/internal/sink"
)

// ShadowConfig is about copies of calls, which routes ask for.
type ShadowConfig struct {
	shadow.Limits `yaml:",inline"`
	// Redact is what the report of differences must not show.
	Redact archive.RedactConfig `yaml:"redact"`
	// Only says that this workload is a shadow and nothing else: whatever it does
	// is held to what changes nothing. Without it that is so only of what it does
	// for a call that is marked, if it hands traceparent and tracestate on.
	Only bool `yaml:"only"`
	// WritesTo are the services that a shadow may change all the same, since they
	// stand beside it.
	WritesTo []mesh.ServiceName `yaml:"writes_to"`
}

// ArchiveConfig is an archive of copied calls.
type ArchiveConfig struct {
	archive.Settings `yaml:",inline"`
	// Upload puts what is written into another place, too.
	Upload UploadConfig `yaml:"upload"`
}

// UploadConfig is at most one place.
type UploadConfig struct {
	// Folder is one that is there, such as a mounted share.
	Folder string `yaml:"folder"`
	// S3 is a bucket.
	S3 *sink.S3Config `yaml:"s3"`
}

// fieldsOf puts the name of a section before each mistake in it.
func fieldsOf(section string, err error) error {
	if err == nil {
		return nil
	}
	if j, several := err.(interface{ Unwrap() []error }); several {
		var errs []error
		for _, e := range j.Unwrap() {
			errs = append(errs, fieldsOf(section, e))
		}
		return errors.Join(errs...)
	}
	return fmt.Errorf("%s.%w", section, err)
}

func (c *Config) validateShadow() error {
	errs := []error{fieldsOf("shadow", c.Shadow.Limits.Validate()), fieldsOf("shadow.redact", c.Shadow.Redact.Validate())}
	dirs := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(c.Archives)) {
		a := c.Archives[name]
		at := "archives." + name
		if err := archive.CheckName(name); err != nil {
			errs = append(errs, fmt.Errorf("archives: %w", err))
		}
		errs = append(errs, fieldsOf(at, a.Validate()))
		if a.Upload.Folder != "" && a.Upload.S3 != nil {
			errs = append(errs, fmt.Errorf("%s.upload: folder and s3 are both given; write one", at))
		}
		if a.Upload.S3 != nil {
			errs = append(errs, fieldsOf(at+".upload.s3", a.Upload.S3.Validate()))
		}
		dir := c.archiveDir(name)
		if other, ok := dirs[dir]; ok {
			errs = append(errs, fmt.Errorf("%s.dir: %s is that of archive %s", at, dir, other))
		}
		dirs[dir] = name
	}
	return errors.Join(errs...)
}

func (c *Config) archiveDir(name string) string {
	if d := c.Archives[name].Dir; d != "" {
		return filepath.Clean(d)
	}
	return filepath.Join(c.DataDir, "archives", name)
}

// openMirror prepares copies of calls.
func (s *sidecar) openMirror() (err error) {
	if err := daemon.OwnDir("run_dir", s.cfg.RunDir); err != nil {
		return err
	}
	s.mirror, err = shadow.New(shadow.Config{
		Limits: s.cfg.Shadow.Limits, Dir: s.cfg.RunDir, Lend: proxy.LendShadow(s.services), Archive: s.archive,
		Redact: archive.NewRedactor(s.cfg.Shadow.Redact), Metrics: s.metrics, Tracer: s.tracer, Log: s.log,
	})
	return err
}

// archive keeps a record in the archive of a name.
func (s *sidecar) archive(name string, r *archive.Record) {
	if as := s.archives.Load(); as != nil && (*as)[name] != nil {
		(*as)[name].Add(r)
		return
	}
	s.metrics.ArchiveRecords(name, "dropped").Inc()
}

// holdArchives opens the archives, which one process writes. One that cannot be
// opened costs its records, and no call.
func (s *sidecar) holdArchives() {
	as := map[string]*archive.Archive{}
	for _, name := range slices.Sorted(maps.Keys(s.cfg.Archives)) {
		a, err := s.openArchive(name)
		if err != nil {
			s.log.Error("an archive cannot be opened, its records are dropped", "archive", name, "err", err)
			continue
		}
		as[name] = a
	}
	s.archives.Store(&as)
}

func (s *sidecar) openArchive(name string) (*archive.Archive, error) {
	conf := s.cfg.Archives[name]
	conf.Dir = s.cfg.archiveDir(name)
	keys := filepath.Join(s.cfg.DataDir, "archives")
	if err := os.MkdirAll(keys, 0o700); err != nil {
		return nil, err
	}
	signer, err := audit.OpenSigner(filepath.Join(keys, name+".key"), "sallyport-archive-"+name+"-")
	if err != nil {
		return nil, err
	}
	upload, err := conf.Upload.open(name, sink.Env{Identity: s.agent.Source().Certificate})
	if err != nil {
		return nil, err
	}
	return archive.Open(archive.Config{
		Settings: conf.Settings, Name: name, Origin: signer.Origin(), Key: signer.Key(), Upload: upload, Metrics: s.metrics, Log: s.log,
		Sign: func(h archive.Head) ([]byte, error) { return signer.Sign(h.Size, h.Root) },
		Sealed: func(l archive.Link) error {
			r := audit.Record{Kind: audit.KindArchive, Reason: "sealed", Detail: fmt.Sprintf("archive %s, line %d: %s sha256 %s, %d records; head by %s", name, l.Seq, l.File, l.SHA256, l.Records, signer.Key())}
			if len(l.Removed) > 0 {
				r.Reason, r.Detail = "removed", fmt.Sprintf("archive %s, line %d: %d segments from %s", name, l.Seq, len(l.Removed), l.Removed[0])
			}
			return s.audit.Append(&r)
		},
	})
}

// open is how files of an archive reach the other place; nil when there is none.
func (u UploadConfig) open(archiveName string, env sink.Env) (func(context.Context, string, io.Reader, int64) error, error) {
	switch {
	case u.S3 != nil:
		b, err := sink.OpenBucket(u.S3, env)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, name string, r io.Reader, size int64) error {
			return b.Put(ctx, path.Join(archiveName, name), r, size)
		}, nil
	case u.Folder != "":
		return func(_ context.Context, name string, r io.Reader, _ int64) error {
			return copyInto(filepath.Join(u.Folder, archiveName), name, r)
		}, nil
	}
	return nil, nil
}

// copyInto writes a file, whole or not at all.
func copyInto(dir, name string, r io.Reader) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".copy-")
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, name))
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// keepArchives starts what holdArchives has opened.
func (s *sidecar) keepArchives(ground context.Context, g *errgroup.Group) {
	for _, a := range *s.archives.Load() {
		g.Go(func() error {
			if err := a.Run(ground); err != nil {
				s.log.Error("an archive was not closed", "err", err)
			}
			return nil
		})
	}
}
