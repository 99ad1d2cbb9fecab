package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/archive"
	"sallyport/internal/audit"
	"sallyport/internal/daemon"
	"sallyport/internal/shadow"
)

// archive is "sallyport archive".
func (c *cli) archive() *cobra.Command {
	cmd := &cobra.Command{Use: "archive", Short: "Check and read archives of copied calls"}
	cmd.AddCommand(c.archiveList(), c.archiveVerify(), c.archiveDecrypt(), c.archiveReplay(), c.archiveDiff(), c.archiveKeygen())
	return cmd
}

func (c *cli) archiveList() *cobra.Command {
	return &cobra.Command{
		Use:   "list DIR",
		Short: "Show the segments of an archive",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			segs, err := archive.Segments(args[0])
			if err != nil {
				return usage(err)
			}
			if len(segs) == 0 {
				if _, err := os.Stat(args[0]); err != nil {
					return usage(err)
				}
			}
			return c.emitSegments(segs, segs)
		},
	}
}

func (c *cli) emitSegments(v any, segs []archive.Link) error {
	rows := make([][]string, 0, len(segs))
	for _, l := range segs {
		state := "whole"
		if l.Cut {
			state = "cut"
		}
		rows = append(rows, []string{l.File, fmt.Sprint(l.Records), fmt.Sprint(l.Bytes), stamp(l.First), stamp(l.Last), state})
	}
	return c.emit(v, []string{"SEGMENT", "RECORDS", "BYTES", "FIRST", "LAST", "STATE"}, rows)
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

func (c *cli) archiveVerify() *cobra.Command {
	var key string
	cmd := &cobra.Command{
		Use:   "verify DIR",
		Short: "Check that an archive is whole and as it was written, without being able to read it",
		Long: `Check that an archive is whole and as it was written, without being able to
read it: the bytes of each segment, the chain of hashes, and who signed its end.

Give the key that must have signed with --key: the one beside the archive was
put there by whoever wrote the archive. It also stands in the audit log, in the
records of kind archive, which are cosigned.

Exit code 0: it is whole. 1: it is not. 2: it cannot be read. 3: it is whole, by
the key beside it.`,
		Args: cobra.ExactArgs(1),
	}
	cmd.Flags().StringVar(&key, "key", "", "key of the archive, or a file that holds it (archive.vkey)")
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if b, err := os.ReadFile(key); err == nil {
			key = strings.TrimSpace(string(b))
		} else if key != "" && !strings.Contains(key, "+") {
			return usage(fmt.Errorf("--key: %q is no key, and no file that holds one: %w", key, err))
		}
		rep, err := archive.Verify(args[0], key, func(signed []byte, key string) (archive.Head, error) {
			h, err := audit.OpenCheckpoint(signed, key)
			return archive.Head(h), err
		})
		if err != nil {
			return usage(err)
		}
		if err := c.emitSegments(rep, rep.Segments); err != nil {
			return err
		}
		if len(rep.Problems) > 0 {
			return failed(errors.New(strings.Join(rep.Problems, "\n")))
		}
		if c.format == "table" {
			fmt.Fprintf(c.stdout, "whole: %s, %s in %s; %s removed by retention\n", count(len(rep.Segments), "segment"), count(rep.Records, "record"), count(int(rep.Bytes), "byte"), fmt.Sprint(rep.Removed))
		}
		if rep.Own {
			return daemon.Hint(&daemon.ExitError{Code: unconfirmed, Err: errors.New("the archive is whole, by the key that came with it")},
				"name the key that must have signed with --key; the audit log has it in the records of kind archive")
		}
		return nil
	}
	return cmd
}

// reading is what commands that read records have in common.
type reading struct {
	keys   []string
	ignore []string
}

func (f *reading) add(cmd *cobra.Command) {
	cmd.Flags().StringArrayVarP(&f.keys, "auditor", "i", nil, "file with the private key of an auditor, as age-keygen writes it")
}

func (f *reading) addIgnore(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&f.ignore, "ignore", nil, "header field, or path of JSON such as items.*.id, that may differ")
}

// each reads the records of a folder, or of a file of lines.
func (f *reading) each(path string, do func(*archive.Record) error) error {
	st, err := os.Stat(path)
	if err != nil {
		return usage(err)
	}
	if !st.IsDir() {
		file, err := os.Open(path)
		if err != nil {
			return usage(err)
		}
		defer file.Close()
		err = archive.ReadRecords(file, do)
		if errors.Is(err, archive.ErrStop) {
			return nil
		}
		return failed(err)
	}
	if len(f.keys) == 0 {
		return usage(errors.New("--auditor: missing; name the file with the private key of an auditor"))
	}
	ids, err := archive.ReadIdentities(f.keys...)
	if err != nil {
		return usage(fmt.Errorf("--auditor: %w", err))
	}
	return failed(archive.Each(path, ids, do))
}

func (c *cli) archiveKeygen() *cobra.Command {
	return &cobra.Command{
		Use:   "keygen FILE",
		Short: "Make the key of an auditor: the private one in FILE, the public one on stdout",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			public, err := archive.NewAuditor(args[0])
			if err != nil {
				return usage(err)
			}
			_, err = fmt.Fprintln(c.stdout, public)
			return err
		},
	}
}

func (c *cli) archiveDecrypt() *cobra.Command {
	var f reading
	cmd := &cobra.Command{
		Use:   "decrypt DIR",
		Short: "Write the records of an archive to stdout, one JSON object a line",
		Args:  cobra.ExactArgs(1),
	}
	f.add(cmd)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		out := bufio.NewWriter(c.stdout)
		e := json.NewEncoder(out)
		err := f.each(args[0], func(r *archive.Record) error { return e.Encode(r) })
		return errors.Join(err, out.Flush())
	}
	return cmd
}

func (c *cli) archiveDiff() *cobra.Command {
	var f reading
	var replayed bool
	cmd := &cobra.Command{
		Use:   "diff DIR|FILE",
		Short: "Show in what the shadow's answers differ from the primary's",
		Long: `Show in what the shadow's answers differ from the primary's, or with --replayed
those that a replay got. FILE is what decrypt or replay --out has written.

Exit code 0: they do not differ. 1: they do, or something cannot be read.`,
		Args: cobra.ExactArgs(1),
	}
	f.add(cmd)
	f.addIgnore(cmd)
	cmd.Flags().BoolVar(&replayed, "replayed", false, "compare what a replay was answered, instead of the shadow")
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		var rep shadow.Reports
		n := 0
		err := f.each(args[0], func(r *archive.Record) error {
			other := r.Shadow
			if replayed {
				other = r.Replayed
			}
			if r.Primary != nil && other != nil {
				n++
				addPair(&rep, r, other, f.ignore)
			}
			return nil
		})
		if err != nil {
			return err
		}
		return c.emitComparison(rep.Report(), n)
	}
	return cmd
}

// nothingToHide redacts what a record does not hold any more anyway.
var nothingToHide = archive.NewRedactor(archive.RedactConfig{})

func addPair(rep *shadow.Reports, r *archive.Record, other *archive.Answer, ignore []string) {
	call := shadow.Seen{Route: r.Route, Shadow: r.Name, Trace: r.Trace}
	if r.Request != nil {
		call.Method, call.Path = r.Request.Method, r.Request.Path
	}
	rep.Add(call, shadow.Compare(r.Primary, other, ignore), nil, false, nothingToHide)
}

// emitComparison prints a report, and fails when there is a difference.
func (c *cli) emitComparison(rep shadow.Report, compared int) error {
	if err := c.emitReport(rep, rep.Endpoints); err != nil {
		return err
	}
	differing := 0
	for _, e := range rep.Endpoints {
		differing += e.Differing
	}
	if differing > 0 {
		return failed(fmt.Errorf("%d of %s differ", differing, count(compared, "pair")))
	}
	if c.format == "table" {
		fmt.Fprintf(c.stdout, "%s, no difference\n", count(compared, "pair"))
	}
	return nil
}

// emitReport prints differences as a table.
func (c *cli) emitReport(v any, es []shadow.Endpoint) error {
	var rows [][]string
	for _, e := range es {
		at := []string{cmp.Or(e.Route, "-"), cmp.Or(e.Shadow, "-"), strings.TrimSpace(e.Method + " " + e.Path), fmt.Sprintf("%d of %d", e.Differing, e.Compared)}
		if len(e.Fields) == 0 {
			rows = append(rows, append(at, "-", "-", "-", "-", "-"))
		}
		for _, f := range e.Fields {
			rows = append(rows, append(at[:4:4], f.Field, fmt.Sprint(f.Differs), f.Verdict, fmt.Sprintf("%q", f.Sample.Primary), fmt.Sprintf("%q", f.Sample.Shadow)))
		}
	}
	return c.emit(v, []string{"ROUTE", "SHADOW", "CALL", "DIFFER", "FIELD", "TIMES", "VERDICT", "PRIMARY", "SHADOW'S"}, rows)
}

// replayFlags say how a replay is made.
type replayFlags struct {
	reading
	target, out string
	rate        float64
	count       int
	timeout     time.Duration
	writes, h2  bool
}

func (c *cli) archiveReplay() *cobra.Command {
	var f replayFlags
	cmd := &cobra.Command{
		Use:   "replay DIR|FILE --target URL",
		Short: "Make archived calls again, and compare what is answered with what the primary did",
		Long: `Make archived calls again to a target, marked as copies, and compare what is
answered with what the primary answered then. Calls that may change something are
made only with --writes. Fields that were redacted are left out, and so are calls
whose body was.

Exit code 0: the answers do not differ. 1: they do, or a call failed.`,
		Args: cobra.ExactArgs(1),
	}
	f.add(cmd)
	f.addIgnore(cmd)
	fl := cmd.Flags()
	fl.StringVar(&f.target, "target", "", "where to send them: http://HOST:PORT or https://HOST")
	fl.StringVar(&f.out, "out", "", "write the records with the new answers to this file, for diff --replayed")
	fl.Float64Var(&f.rate, "rate", 10, "calls a second")
	fl.IntVar(&f.count, "count", 100, "stop after so many calls; 0 for all")
	fl.DurationVar(&f.timeout, "timeout", 10*time.Second, "of each call")
	fl.BoolVar(&f.writes, "writes", false, "make calls that may change something, too")
	fl.BoolVar(&f.h2, "http2", false, "speak HTTP/2 to an http target, as servers of gRPC do")
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return c.replay(cmd, &f, args[0]) }
	return cmd
}

func (f *replayFlags) open() (*shadow.Replay, error) {
	u, err := url.Parse(f.target)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || strings.Trim(u.Path, "/") != "" {
		return nil, usage(fmt.Errorf("--target: %q is not like http://127.0.0.1:8080", f.target))
	}
	if f.rate <= 0 || f.rate > 100_000 || f.count < 0 {
		return nil, usage(errors.New("--rate: must be above 0 and at most 100000, and --count not negative"))
	}
	tr := &http.Transport{DisableCompression: true, Protocols: new(http.Protocols)}
	tr.Protocols.SetHTTP1(!f.h2)
	tr.Protocols.SetHTTP2(true)
	tr.Protocols.SetUnencryptedHTTP2(f.h2)
	client := &http.Client{Transport: tr, Timeout: f.timeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return &shadow.Replay{Target: &url.URL{Scheme: u.Scheme, Host: u.Host}, Client: client, Writes: f.writes, Answer: 64 << 20}, nil
}

func (c *cli) replay(cmd *cobra.Command, f *replayFlags, path string) (err error) {
	r, err := f.open()
	if err != nil {
		return err
	}
	out := io.Discard
	if f.out != "" {
		file, err := os.OpenFile(f.out, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return usage(fmt.Errorf("--out: %w", err))
		}
		defer func() { err = errors.Join(err, file.Close()) }()
		out = file
	}
	e := json.NewEncoder(out)
	pace := time.NewTicker(time.Duration(float64(time.Second) / f.rate))
	defer pace.Stop()
	var rep shadow.Reports
	sent, skipped, broken, pairs, first := 0, 0, 0, 0, ""
	err = f.each(path, func(rec *archive.Record) error {
		a, err := r.Send(cmd.Context(), rec)
		switch {
		case errors.Is(err, shadow.ErrSkipped):
			skipped++
			return nil
		case err != nil:
			broken++
			first = cmp.Or(first, fmt.Sprintf("trace %s: %v", rec.Trace, err))
		case rec.Primary != nil:
			pairs++
			addPair(&rep, rec, a, f.ignore)
		}
		rec.Replayed = a
		if err := e.Encode(rec); err != nil {
			return err
		}
		if sent++; sent == f.count {
			return archive.ErrStop
		}
		select {
		case <-pace.C:
			return nil
		case <-cmd.Context().Done():
			return cmd.Context().Err()
		}
	})
	if err != nil {
		return err
	}
	if c.format == "table" {
		fmt.Fprintf(c.stdout, "%s sent, %d failed, %d skipped\n", count(sent, "call"), broken, skipped)
	}
	if err := c.emitComparison(rep.Report(), pairs); err != nil || broken == 0 {
		return err
	}
	return failed(fmt.Errorf("%d of %s failed, the first of them: %s", broken, count(sent, "call"), first))
}
