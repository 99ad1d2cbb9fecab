// Package sink sends the audit log of this machine to other systems.
//
// The log is the spool: a Sink reads it as it is written, from a cursor that is
// on the disk, and hands it in batches to its peer, each record at least once
// and in order. It keeps nobody waiting: a peer that is down is tried again for
// as long as it takes, and each sink stands alone. What a kind of peer needs is
// in the file of its name; the loop, the cursor and the counts are the same for
// all. Run works in the caller's goroutine; only the Kafka client starts others,
// and they end with it.
package sink

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"time"

	"sallyport/internal/audit"
	"sallyport/internal/telemetry"
)

// Config is one system that gets the audit records.
type Config struct {
	// Name of the sink; it names the file of its cursor. Required.
	Name string `yaml:"name"`
	// Format is native or ocsf. Default native.
	Format string `yaml:"format"`
	// Batch bounds what is handed over at once.
	Batch BatchConfig `yaml:"batch"`

	// Exactly one of these says what the system is.
	File   *FileConfig   `yaml:"file"`
	HTTP   *HTTPConfig   `yaml:"http"`
	Kafka  *KafkaConfig  `yaml:"kafka"`
	OTLP   *OTLPConfig   `yaml:"otlp"`
	S3     *S3Config     `yaml:"s3"`
	Syslog *SyslogConfig `yaml:"syslog"`
}

// BatchConfig bounds what is handed over at once. The defaults are those of the
// kind of sink.
type BatchConfig struct {
	// Records is the most records in a batch. Default 1000; s3 50,000.
	Records int `yaml:"records"`
	// Bytes is the most bytes in a batch, unless one record has more. Default
	// 1 MiB; s3 16 MiB.
	Bytes int `yaml:"bytes"`
	// Wait is how long a batch that is not full waits for more. Default 20 ms;
	// syslog 1 s, s3 10 s.
	Wait time.Duration `yaml:"wait"`
}

// The most that may be asked of a batch.
const (
	mostRecords = 100_000
	mostBytes   = 64 << 20
	mostWait    = 10 * time.Minute
)

func (b BatchConfig) validate() error {
	var errs []error
	if b.Records < 0 || b.Records > mostRecords {
		errs = append(errs, fmt.Errorf("records: %d is not 1 to %d", b.Records, mostRecords))
	}
	if b.Bytes < 0 || b.Bytes > mostBytes || b.Bytes > 0 && b.Bytes < 1024 {
		errs = append(errs, fmt.Errorf("bytes: %d is not 1024 to %d", b.Bytes, mostBytes))
	}
	if b.Wait < 0 || b.Wait > mostWait {
		errs = append(errs, fmt.Errorf("wait: %s is not 0s to %s", b.Wait, mostWait))
	}
	return within("batch", errs...)
}

// or fills what was left out.
func (b BatchConfig) or(d BatchConfig) BatchConfig {
	return BatchConfig{cmp.Or(b.Records, d.Records), cmp.Or(b.Bytes, d.Bytes), cmp.Or(b.Wait, d.Wait)}
}

// within puts the name of a section before each mistake in it.
func within(section string, errs ...error) error {
	var out []error
	for _, e := range errs {
		if e == nil {
			continue
		}
		if j, several := e.(interface{ Unwrap() []error }); several {
			out = append(out, within(section, j.Unwrap()...))
			continue
		}
		out = append(out, fmt.Errorf("%s: %w", section, e))
	}
	return errors.Join(out...)
}

var goodName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,31}$`)

// A kind is one sort of peer.
type kind struct {
	name string
	// batch has the defaults.
	batch BatchConfig
	// fixed asks that a batch which was begun comes again with the same first
	// and last record, even after a crash.
	fixed bool
	cfg   kindConfig
}

// kindConfig is the section of a kind in the configuration.
type kindConfig interface {
	validate() error
	// open prepares the peer and contacts nobody.
	open(Env, string) (peer, error)
}

// A peer takes batches. It is used by one goroutine.
type peer interface {
	// deliver hands over a batch and returns nil once the peer has kept each of
	// its records, or as close to that as its protocol can tell. After a
	// *refusal the batch is divided, down to the record that is refused; after
	// a *partial it counts as taken; after any other error it comes again.
	deliver(ctx context.Context, b *batch) error
	// close gives connections up after a failure and at the end; a later
	// deliver makes new ones.
	close()
}

// The defaults of batches: small ones soon, large objects, and not more than a
// connection a second.
var (
	usual       = BatchConfig{Records: 1000, Bytes: 1 << 20, Wait: 20 * time.Millisecond}
	objects     = BatchConfig{Records: 50_000, Bytes: 16 << 20, Wait: 10 * time.Second}
	connections = BatchConfig{Records: 1000, Bytes: 1 << 20, Wait: time.Second}
)

// kinds are the sections that are there.
func (c Config) kinds() (out []kind) {
	for _, k := range [...]struct {
		kind
		there bool
	}{
		{kind{name: "file", batch: usual, cfg: c.File}, c.File != nil},
		{kind{name: "http", batch: usual, cfg: c.HTTP}, c.HTTP != nil},
		{kind{name: "kafka", batch: usual, cfg: c.Kafka}, c.Kafka != nil},
		{kind{name: "otlp", batch: usual, cfg: c.OTLP}, c.OTLP != nil},
		{kind{name: "s3", batch: objects, fixed: true, cfg: c.S3}, c.S3 != nil},
		{kind{name: "syslog", batch: connections, cfg: c.Syslog}, c.Syslog != nil},
	} {
		if k.there {
			out = append(out, k.kind)
		}
	}
	return out
}

// Validate reports every mistake by field name.
func (c Config) Validate() error {
	var errs []error
	if !goodName.MatchString(c.Name) {
		errs = append(errs, fmt.Errorf("name: %.40q is not 1 to 32 of a-z, 0-9, '-' and '_'", c.Name))
	}
	if f := c.Format; f != "" && f != "native" && f != "ocsf" {
		errs = append(errs, fmt.Errorf("format: %.40q is neither native nor ocsf", f))
	}
	errs = append(errs, c.Batch.validate())
	ks := c.kinds()
	if len(ks) != 1 {
		errs = append(errs, fmt.Errorf("%d sections say what the sink is; write exactly one of file, http, kafka, otlp, s3, syslog", len(ks)))
	}
	for _, k := range ks {
		errs = append(errs, within(k.name, k.cfg.validate()))
	}
	if c.OTLP != nil {
		errs = append(errs, within("otlp", c.OTLP.leads("/v1/logs")))
	}
	return errors.Join(errs...)
}

// ListConfig says where else the audit records go. Without sinks only the issuer
// gets them.
type ListConfig struct {
	Sinks []Config `yaml:"sinks"`
	// Spool bounds what waits for them, and for the issuer.
	Spool audit.SpoolConfig `yaml:"spool"`
	// Keep says how long records are kept on this machine. Default for good.
	Keep audit.KeepConfig `yaml:"keep"`
}

// Validate reports every mistake by field name.
func (l ListConfig) Validate() error {
	var errs []error
	names := map[string]bool{}
	for i, c := range l.Sinks {
		at := fmt.Sprintf("audit.sinks[%d]", i)
		errs = append(errs, within(at, c.Validate()))
		if names[c.Name] {
			errs = append(errs, fmt.Errorf("%s: name: %q is there twice", at, c.Name))
		}
		names[c.Name] = true
	}
	if err := l.Spool.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("audit.spool.%w", err))
	}
	errs = append(errs, within("audit.keep", l.Keep.Validate()))
	return errors.Join(errs...)
}

// Env is what the sinks of a program share.
type Env struct {
	// Program is the name of the program, for the peer. Required.
	Program string
	// Path of the audit log; cursors stand beside it. Required.
	Path string
	// Durable is the newest record that is on the disk: what a crash could take
	// back is not sent. Required.
	Durable func() uint64
	// Append writes the record that says what a peer refused. Required.
	Append func(*audit.Record) error
	// Identity is the program's own X.509-SVID, nil when it has none.
	Identity func() (*tls.Certificate, error)
	// Metrics counts what is sent. Nil counts nothing.
	Metrics *telemetry.Registry
	// Log receives failures. Required.
	Log *slog.Logger
}

// NewAll prepares every sink of a program. It contacts nobody.
func NewAll(l ListConfig, env Env) ([]*Sink, error) {
	out := make([]*Sink, 0, len(l.Sinks))
	for _, c := range l.Sinks {
		s, err := New(c, env)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}
