package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
)

// copies are the logs that a path names: one, or all in the directory where an
// issuer keeps its copies.
func copies(path string) ([]string, error) {
	if st, err := os.Stat(path); err != nil || !st.IsDir() {
		return []string{path}, nil //nolint:nilerr // who opens the log says what is wrong
	}
	names, err := filepath.Glob(filepath.Join(path, "*.jsonl"))
	if err == nil && len(names) == 0 {
		err = fmt.Errorf("no audit log (*.jsonl) is in %s", path)
	}
	return names, err
}

// checkedCopy is what verify says of one of several logs.
type checkedCopy struct {
	Copy string `json:"copy"`
	// Owner is whose log the issuer has signed under the name of the copy.
	Owner string `json:"owner,omitempty"`
	// Missing: the issuer has signed this many records of a log that is not
	// here.
	Missing uint64        `json:"missing,omitempty"`
	Report  *audit.Report `json:"report,omitempty"`
}

// verifyCopies checks each copy in a directory against what was signed of the
// log it must be, and that none is missing that was signed.
func (c *cli) verifyCopies(dir string, trust audit.Trust) error {
	names, err := copies(dir)
	if err != nil {
		return usage(err)
	}
	var out []checkedCopy
	var rows [][]string
	var bad, doubt int
	here := map[string]bool{}
	for _, name := range names {
		base := filepath.Base(name)
		here[base] = true
		one := trust
		heads, owner := audit.HeadsOf(trust.Heads, base)
		if one.Heads = heads; len(heads) > 0 {
			one.Workload = owner.Workload
		}
		if !trust.Workload.IsZero() && one.Workload != trust.Workload {
			continue
		}
		rep, err := audit.VerifyFile(name, one)
		if err != nil && !errors.Is(err, audit.ErrBroken) {
			return usage(err)
		}
		k := checkedCopy{Copy: base, Report: &rep}
		if len(heads) > 0 {
			k.Owner = owner.String()
		}
		out = append(out, k)
		if rep.Err() != nil {
			bad++
		} else if !rep.Confirmed() {
			doubt++
		}
		for _, v := range []struct {
			what string
			audit.Verdict
		}{{"integrity", rep.Integrity}, {"completeness", rep.Completeness}, {"identity", rep.Identity}, {"time", rep.Time}} {
			rows = append(rows, []string{base, v.what, sayVerdict(v.Verdict)})
		}
	}
	for _, h := range trust.Heads {
		o, ok := audit.ParseLogName(h.Name)
		if !ok || o.Issuer != "" || !trust.Workload.IsZero() && o.Workload != trust.Workload {
			continue
		}
		if base := audit.CopyName(o.Workload, o.Agent); !here[base] {
			bad++
			out = append(out, checkedCopy{Copy: base, Owner: o.String(), Missing: h.Size})
			rows = append(rows, []string{base, "completeness", fmt.Sprintf("FAIL  not here; %d records of it were signed", h.Size)})
		}
	}
	if err := c.emit(out, []string{"COPY", "CHECK", "VERDICT"}, rows); err != nil {
		return err
	}
	switch {
	case bad > 0:
		return &daemon.ExitError{Code: daemon.Failed, Err: fmt.Errorf("%d of %d copies are not what was written", bad, len(out))}
	case doubt > 0:
		return daemon.Hint(&daemon.ExitError{Code: unconfirmed, Err: fmt.Errorf("nothing is wrong with the copies, but %d of %d are not confirmed", doubt, len(out))},
			"sallyport audit verify DIR --heads HEADS, with HEADS from: sallyport audit heads -o json")
	}
	return nil
}

// prove makes a proof from the tree beside the log, or for a copy without one
// from what was signed of it.
func prove(path string, seq uint64, heads []audit.Head) (audit.Proof, error) {
	if _, err := os.Stat(audit.TreeDir(path)); err == nil || len(heads) == 0 {
		p, err := audit.Prove(path, seq)
		if errors.Is(err, os.ErrNotExist) {
			err = daemon.Hint(err, "for an issuer's copy name what was signed, with --heads, or --socket to ask the issuer")
		}
		return p, err
	}
	if own, _ := audit.HeadsOf(heads, filepath.Base(path)); len(own) > 0 {
		heads = own
	}
	return audit.ProveCopy(path, seq, heads)
}

// copyLabel goes before a line when several logs are shown in one table.
func copyLabel(path string) string {
	return strings.TrimSuffix(filepath.Base(path), ".jsonl") + "  "
}
