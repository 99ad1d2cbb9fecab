package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/control"
	"sallyport/internal/daemon"
)

// unconfirmed is the exit code of a check that found nothing wrong and cannot
// say that all is right.
const unconfirmed = 3

// audit is "sallyport audit".
func (c *cli) audit() *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "Check and read audit logs"}
	cmd.AddCommand(c.auditVerify(), c.auditHeads(), c.auditProve(), c.auditCheck(), c.auditTail(), c.auditQuery(), c.auditExport())
	return cmd
}

// trustFlags is what a verifier believes.
type trustFlags struct {
	heads, workload string
	witnesses       []string
}

func (f *trustFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.heads, "heads", "", "file made by sallyport audit heads")
	cmd.Flags().StringArrayVar(&f.witnesses, "witness", nil, "key of a witness, or a file with keys (witness.vkey of an issuer)")
	cmd.Flags().StringVar(&f.workload, "workload", "", "SPIFFE ID of the workload whose log it must be")
}

// knownHeads is the output of audit heads.
type knownHeads struct {
	Witnesses []string     `json:"witnesses"`
	Heads     []audit.Head `json:"heads"`
}

// trust reads what the flags name. A socket that was named is asked for heads.
func (f *trustFlags) trust(c *cli, cmd *cobra.Command) (t audit.Trust, err error) {
	if f.workload != "" {
		if t.Workload, err = spiffeid.FromString(f.workload); err != nil {
			return t, usage(fmt.Errorf("--workload: %w", err))
		}
	}
	var known knownHeads
	switch {
	case f.heads != "":
		b, err := os.ReadFile(f.heads)
		if err == nil {
			err = json.Unmarshal(b, &known)
		}
		if err != nil {
			return t, usage(fmt.Errorf("--heads: %w", err))
		}
	case cmd.Flags().Changed("socket"):
		if known, err = c.readHeads(cmd); err != nil {
			return t, usage(err) // not Unreachable, which is as a number unconfirmed
		}
	}
	t.Heads, t.Witnesses = known.Heads, known.Witnesses
	if len(f.witnesses) > 0 {
		t.Witnesses = nil // only those that were named
	}
	for _, w := range f.witnesses {
		b, err := os.ReadFile(w)
		switch {
		case err == nil:
			t.Witnesses = append(t.Witnesses, strings.Fields(string(b))...)
		case strings.Contains(w, "+"): // as every key has it
			t.Witnesses = append(t.Witnesses, w)
		default:
			return t, usage(fmt.Errorf("--witness: %q is no key of a witness, and no file of keys: %w", w, err))
		}
	}
	return t, nil
}

func (c *cli) readHeads(cmd *cobra.Command) (out knownHeads, err error) {
	a, err := c.admin()
	if err != nil {
		return out, err
	}
	defer a.Close()
	h, err := a.AuditHeads(cmd.Context())
	if errors.Is(err, control.ErrUnreachable) {
		return out, c.unreachable(err)
	}
	if err != nil {
		return out, err
	}
	out.Witnesses = h.Witnesses
	for _, b := range h.Heads {
		head, err := audit.ParseHead(b)
		if err != nil {
			return out, err
		}
		out.Heads = append(out.Heads, head)
	}
	return out, nil
}

func (c *cli) auditHeads() *cobra.Command {
	return &cobra.Command{
		Use:   "heads",
		Short: "Ask the issuer how far it has signed each audit log; -o json is what verify --heads reads",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			known, err := c.readHeads(cmd)
			if err != nil {
				return err
			}
			rows := make([][]string, 0, len(known.Heads))
			for _, h := range known.Heads {
				name := h.Name
				if o, ok := audit.ParseLogName(h.Name); ok {
					name = o.String()
				}
				rows = append(rows, []string{name, fmt.Sprint(h.Size), h.Time.Format(time.RFC3339), fmt.Sprint(len(h.Before))})
			}
			return c.emit(known, []string{"LOG OF", "RECORDS", "SIGNED", "EARLIER LOGS"}, rows)
		},
	}
}

func (c *cli) auditVerify() *cobra.Command {
	var f trustFlags
	cmd := &cobra.Command{
		Use:   "verify FILE|DIR",
		Short: "Check an audit log: nothing changed, nothing missing, whose it is, times in order",
		Long: `Check an audit log, with all files put aside and the checkpoints beside it.

Each question has its own verdict. A log by itself can be found broken, but not
whole: give what the issuer has signed with --heads (or --socket, to ask it), or
at least the key of the witness with --witness.

Of a directory, such as received/ of an issuer, each copy is held against what
was signed of its log, and none may be missing.

Exit code 0: all pass. 1: at least one fails. 2: the log cannot be read.
3: none fails, but at least one is not confirmed.`,
		Args: cobra.ExactArgs(1),
	}
	f.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		trust, err := f.trust(c, cmd)
		if err != nil {
			return err
		}
		if st, err := os.Stat(args[0]); err == nil && st.IsDir() {
			return c.verifyCopies(args[0], trust)
		}
		rep, err := audit.VerifyFile(args[0], trust)
		if err != nil && !errors.Is(err, audit.ErrBroken) {
			return usage(err)
		}
		rows := [][]string{
			{"integrity", sayVerdict(rep.Integrity)}, {"completeness", sayVerdict(rep.Completeness)},
			{"identity", sayVerdict(rep.Identity)}, {"time", sayVerdict(rep.Time)},
		}
		if err := c.emit(rep, []string{"CHECK", "VERDICT"}, rows); err != nil {
			return err
		}
		if c.format == "table" {
			fmt.Fprintf(c.stdout, "%d records\n", rep.Records)
		}
		if err := rep.Err(); err != nil {
			return &daemon.ExitError{Code: daemon.Failed, Err: err}
		}
		if !rep.Confirmed() {
			return daemon.Hint(&daemon.ExitError{Code: unconfirmed, Err: errors.New("nothing is wrong with the audit log, but not all of it is confirmed")},
				"sallyport audit verify FILE --heads HEADS, with HEADS from: sallyport audit heads -o json")
		}
		return nil
	}
	return cmd
}

func sayVerdict(v audit.Verdict) string {
	switch {
	case v.OK && v.Detail != "":
		return "pass  " + v.Detail
	case v.OK:
		return "pass"
	case v.Unconfirmed:
		return "unconfirmed  " + v.Detail
	case v.Line == 0:
		return "FAIL  " + v.Detail
	}
	return fmt.Sprintf("FAIL  line %d: %s", v.Line, v.Detail)
}

func (c *cli) auditProve() *cobra.Command {
	var log string
	var f trustFlags
	cmd := &cobra.Command{
		Use:   "prove SEQ --log FILE",
		Short: "Prove that a record is in a log, for somebody who does not have the log",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			seq, err := strconv.ParseUint(args[0], 10, 64)
			if err != nil {
				return usage(fmt.Errorf("SEQ: %q is not the number of a record, such as 4711", args[0]))
			}
			trust, err := f.trust(c, cmd)
			if err != nil {
				return err
			}
			p, err := prove(log, seq, trust.Heads)
			if err != nil {
				return usage(err)
			}
			e := json.NewEncoder(c.stdout)
			e.SetIndent("", "  ")
			return e.Encode(p)
		},
	}
	cmd.Flags().StringVar(&log, "log", "audit.jsonl", "the audit log, or an issuer's copy")
	cmd.Flags().StringVar(&f.heads, "heads", "", "file made by sallyport audit heads; for an issuer's copy")
	return cmd
}

func (c *cli) auditCheck() *cobra.Command {
	var f trustFlags
	cmd := &cobra.Command{
		Use:   "check PROOF",
		Short: "Check what audit prove has made, without the log",
		Args:  cobra.ExactArgs(1),
	}
	f.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		trust, err := f.trust(c, cmd)
		if err != nil {
			return err
		}
		b, err := os.ReadFile(args[0])
		if err != nil {
			return usage(err)
		}
		var p audit.Proof
		if err := json.Unmarshal(b, &p); err != nil {
			return usage(fmt.Errorf("%s: %w", args[0], err))
		}
		proved, err := p.Check(trust.Witnesses)
		if err == nil && !trust.Workload.IsZero() && proved.Owner.Workload != trust.Workload {
			err = fmt.Errorf("it is of the log of %s", proved.Owner)
		}
		if err != nil {
			return &daemon.ExitError{Code: daemon.Failed, Err: err}
		}
		fmt.Fprint(c.stdout, p.Record)
		if proved.Signed.IsZero() {
			return daemon.Hint(&daemon.ExitError{Code: unconfirmed, Err: errors.New("the log has signed it, but no witness whose key was given")},
				"name the key with --witness")
		}
		fmt.Fprintf(c.stdout, "in the log of %s, signed by a witness at %s\n", proved.Owner, proved.Signed.UTC().Format(time.RFC3339))
		return nil
	}
	return cmd
}

// filterFlags pick records.
type filterFlags struct {
	audit.Filter
	since, until string
}

func (f *filterFlags) add(cmd *cobra.Command) {
	fl := cmd.Flags()
	for _, t := range []struct {
		p          *string
		name, what string
	}{
		{&f.Kind, "kind", kindList()},
		{&f.ID, "id", "decision id"}, {&f.Decision, "decision", "allow or deny"}, {&f.Reason, "reason", "why"},
		{&f.Rule, "rule", "id of the policy row"}, {&f.Src, "src", "SPIFFE ID of the caller; * at the end for any end"},
		{&f.Dst, "dst", "SPIFFE ID, or host:NAME; * at the end for any end"}, {&f.Verb, "verb", "such as GET"},
		{&f.Path, "path", "path; * at the end for any end"}, {&f.Trace, "trace", "trace id"},
		{&f.since, "since", "time like 2026-01-02T15:04:05Z, or a duration like 10m before now"},
		{&f.until, "until", "as --since; not included"},
	} {
		fl.StringVar(t.p, t.name, "", t.what)
	}
}

func (f *filterFlags) parse(now time.Time) error {
	if f.Decision != "" && f.Decision != audit.Allow && f.Decision != audit.Deny {
		return usage(fmt.Errorf("--decision: %q is neither allow nor deny", f.Decision))
	}
	if f.Kind != "" && !slices.Contains(audit.Kinds, audit.Kind(f.Kind)) {
		return usage(fmt.Errorf("--kind: %q is not one of %s", f.Kind, kindList()))
	}
	for _, t := range []struct {
		name, text string
		to         *time.Time
	}{{"since", f.since, &f.Since}, {"until", f.until, &f.Until}} {
		if t.text == "" {
			continue
		}
		d, err := time.ParseDuration(t.text)
		if *t.to = now.Add(-d); err == nil {
			continue
		}
		if *t.to, err = time.Parse(time.RFC3339, t.text); err != nil {
			return usage(fmt.Errorf("--%s: %q is neither a duration like 10m nor a time like 2026-01-02T15:04:05Z", t.name, t.text))
		}
	}
	return nil
}

// kindList names the kinds of record.
func kindList() string {
	all := make([]string, len(audit.Kinds))
	for i, k := range audit.Kinds {
		all[i] = string(k)
	}
	return strings.Join(all, ", ")
}

// recordFormat is the format that --output asks for: JSON is that of the log.
func (c *cli) recordFormat() string {
	if c.format == "json" {
		return "native"
	}
	return c.format
}

// write writes a record in one of the formats.
func (c *cli) write(format string, line []byte, r *audit.Record) (err error) {
	switch format {
	case "native":
	case "ocsf":
		line, err = audit.OCSF(r)
	case "table":
		line = []byte(strings.Join([]string{
			fmt.Sprint(r.Seq), r.Time.Format(time.RFC3339), string(r.Kind), cmp.Or(r.Decision, "-"), cmp.Or(r.Reason, "-"),
			cmp.Or(r.Src, "-"), cmp.Or(r.Dst, "-"), strings.TrimSpace(r.Verb + " " + r.Path), r.ID,
		}, "  ") + "\n")
	}
	if err == nil {
		_, err = c.stdout.Write(line)
	}
	return err
}

func (c *cli) auditExport() *cobra.Command {
	var f filterFlags
	var format string
	cmd := &cobra.Command{
		Use:   "export FILE|DIR",
		Short: "Write the records of a log to stdout, as they are kept or in OCSF",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if format != "native" && format != "ocsf" {
				return usage(fmt.Errorf("--format %q is not a format: use native or ocsf", format))
			}
			return c.pick(args[0], &f, format, 0)
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&format, "format", "native", "native or ocsf")
	return cmd
}

func (c *cli) auditQuery() *cobra.Command {
	var f filterFlags
	var limit int
	cmd := &cobra.Command{
		Use:   "query FILE|DIR",
		Short: "Show the records that the flags pick",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return c.pick(args[0], &f, c.recordFormat(), limit)
		},
	}
	f.add(cmd)
	cmd.Flags().IntVar(&limit, "limit", 0, "stop after so many")
	return cmd
}

// pick writes the records that a filter picks, at most limit of them if it is
// not 0.
func (c *cli) pick(path string, f *filterFlags, format string, limit int) error {
	if err := f.parse(time.Now()); err != nil {
		return err
	}
	paths, err := copies(path)
	for n := 0; err == nil && len(paths) > 0 && (limit == 0 || n < limit); paths = paths[1:] {
		label := ""
		if paths[0] != path && format == "table" {
			label = copyLabel(paths[0])
		}
		err = c.pickOf(paths[0], label, f, format, limit, &n)
	}
	if err != nil {
		return usage(err)
	}
	return nil
}

// pickOf is pick of one log, after n records.
func (c *cli) pickOf(path, label string, f *filterFlags, format string, limit int, n *int) error {
	return audit.Each(path, func(line []byte, r *audit.Record) error {
		if !f.Match(r) {
			return nil
		}
		fmt.Fprint(c.stdout, label)
		if err := c.write(format, line, r); err != nil {
			return err
		}
		if *n++; *n == limit {
			return audit.ErrStop
		}
		return nil
	})
}
