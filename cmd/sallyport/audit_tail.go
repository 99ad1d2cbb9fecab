package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/audit"
)

const (
	// lookEvery is how often logs are looked at for more, and listEvery after how
	// many looks a directory is listed for logs that are new.
	lookEvery = 100 * time.Millisecond
	listEvery = 10
)

func (c *cli) auditTail() *cobra.Command {
	var f filterFlags
	var lines uint64
	var follow bool
	cmd := &cobra.Command{
		Use:   "tail FILE|DIR",
		Short: "Show the newest records, and with -f those that come",
		Long: "Show the newest records, and with -f those that come.\n" +
			"Of a directory, such as received/ of an issuer, all logs are shown together, and\n" +
			"those that begin later, too.",
		Args: cobra.ExactArgs(1),
	}
	f.add(cmd)
	cmd.Flags().Uint64VarP(&lines, "lines", "n", 10, "how many records to begin with")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "stay, until interrupted")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := f.parse(time.Now()); err != nil {
			return err
		}
		t := tails{c: c, path: args[0], filter: &f, logs: map[string]*audit.Tail{}, bad: map[string]bool{}}
		defer t.close()
		if st, err := os.Stat(args[0]); err == nil && st.IsDir() {
			t.dir = true
		}
		err := t.begin(lines)
		if err == nil && follow {
			err = t.follow(cmd.Context())
		}
		if err != nil {
			return usage(err)
		}
		return nil
	}
	return cmd
}

// tails follows one log, or all in a directory.
type tails struct {
	c      *cli
	path   string
	dir    bool
	filter *filterFlags
	logs   map[string]*audit.Tail
	bad    map[string]bool // they cannot be read
}

func (t *tails) close() {
	for _, l := range t.logs {
		l.Close()
	}
}

// skip goes on without a log that cannot be read, when there are others.
func (t *tails) skip(name string, err error) error {
	if !t.dir || err == nil {
		return err
	}
	fmt.Fprintf(t.c.stderr, "sallyport: %s is passed over: %v\n", name, err)
	if l := t.logs[name]; l != nil {
		l.Close()
		delete(t.logs, name)
	}
	t.bad[name] = true
	return nil
}

// names lists the logs. A directory may have none yet.
func (t *tails) names() ([]string, error) {
	if !t.dir {
		return []string{t.path}, nil
	}
	return filepath.Glob(filepath.Join(t.path, "*.jsonl"))
}

// tailed is a record of one of the logs.
type tailed struct {
	log  string
	line []byte
	rec  audit.Record
}

// begin shows the newest records of all logs, by their time.
func (t *tails) begin(lines uint64) error {
	names, err := t.names()
	if err != nil {
		return err
	}
	var all []tailed
	for _, name := range names {
		rs, err := t.newest(name, lines)
		if err := t.skip(name, err); err != nil {
			return err
		}
		all = append(all, rs...)
	}
	slices.SortStableFunc(all, func(a, b tailed) int { return a.rec.Time.Compare(b.rec.Time) })
	if n := uint64(len(all)); t.dir && n > lines {
		all = all[n-lines:]
	}
	for _, r := range all {
		if err := t.show(r); err != nil {
			return err
		}
	}
	return nil
}

// newest opens a log and returns its newest records.
func (t *tails) newest(name string, lines uint64) (out []tailed, err error) {
	last, err := audit.LastSeq(name)
	if err != nil {
		return nil, err
	}
	l, err := t.open(name, last-min(last, lines))
	if err != nil {
		return nil, err
	}
	for seq := uint64(0); seq < last; {
		r, err := next(l, name)
		if err != nil || r.line == nil {
			return out, err
		}
		seq, out = r.rec.Seq, append(out, r)
	}
	return out, nil
}

func (t *tails) open(name string, after uint64) (*audit.Tail, error) {
	l, err := audit.OpenTail(name, after)
	if err == nil {
		t.logs[name] = l
	}
	return l, err
}

// next reads one record; its line is nil when there is none yet.
func next(l *audit.Tail, name string) (r tailed, err error) {
	line, seq, err := l.Poll()
	if err != nil || line == nil {
		return r, err
	}
	r = tailed{log: name, line: slices.Clone(line)}
	if r.rec, _, err = audit.ParseLine(line); err != nil {
		err = fmt.Errorf("record %d: %w", seq, err)
	}
	return r, err
}

func (t *tails) show(r tailed) error {
	if !t.filter.Match(&r.rec) {
		return nil
	}
	if format := t.c.recordFormat(); format != "table" || !t.dir {
		return t.c.write(format, r.line, &r.rec)
	}
	fmt.Fprint(t.c.stdout, copyLabel(r.log))
	return t.c.write("table", r.line, &r.rec)
}

// follow shows what comes until ctx ends.
func (t *tails) follow(ctx context.Context) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for n := 0; ; n++ {
		if n%listEvery == 0 {
			if err := t.list(); err != nil {
				return err
			}
		}
		for name := range t.logs {
			if err := t.skip(name, t.drain(ctx, name)); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// list takes up the logs that are new.
func (t *tails) list() error {
	names, err := t.names()
	for _, name := range names {
		if err == nil && t.logs[name] == nil && !t.bad[name] {
			_, err = t.open(name, 0)
		}
	}
	return err
}

// drain shows what there is of one log.
func (t *tails) drain(ctx context.Context, name string) error {
	for ctx.Err() == nil {
		r, err := next(t.logs[name], name)
		if errors.Is(err, audit.ErrBegunAgain) {
			t.logs[name].Close()
			fmt.Fprintf(t.c.stderr, "sallyport: %s: %v\n", name, err)
			_, err = t.open(name, 0)
			if err == nil {
				continue
			}
		}
		if err != nil || r.line == nil {
			return err
		}
		if err := t.show(r); err != nil {
			return err
		}
	}
	return nil
}
