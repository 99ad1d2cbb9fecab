package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
)

// earlier is what an issuer keeps of a log in whose place another was begun.
var earlier = regexp.MustCompile(`^(.+\.jsonl)\.old-[0-9]+$`)

// looseSuffix names the file of lines that do not continue a copy.
const looseSuffix = ".loose"

// copies are the logs that a path names: one, or all in the directory where an
// issuer keeps its copies, those that ended among them.
func copies(path string) ([]string, error) {
	if st, err := os.Stat(path); err != nil || !st.IsDir() {
		return []string{path}, nil //nolint:nilerr // who opens the log says what is wrong
	}
	names, err := filepath.Glob(filepath.Join(path, "*.jsonl"))
	if err == nil && len(names) == 0 {
		err = fmt.Errorf("no audit log (*.jsonl) is in %s", path)
	}
	if err != nil {
		return nil, err
	}
	old, err := filepath.Glob(filepath.Join(path, "*.jsonl.old-*"))
	for _, name := range old {
		if earlier.MatchString(filepath.Base(name)) { // and no file put aside, or evidence
			names = append(names, name)
		}
	}
	return names, err
}

// currentName is the name of the copy that took the place of one.
func currentName(base string) (name string, old bool) {
	if m := earlier.FindStringSubmatch(base); m != nil {
		return m[1], true
	}
	return base, false
}

// checkedCopy is what verify says of one of several logs.
type checkedCopy struct {
	Copy string `json:"copy"`
	// Owner is whose log the issuer has signed under the name of the copy.
	Owner string `json:"owner,omitempty"`
	// Missing: the issuer has signed this many records of a log that is not
	// here.
	Missing uint64 `json:"missing,omitempty"`
	// Loose lines do not continue the copy. Nothing vouches for them.
	Loose  int           `json:"loose,omitempty"`
	Report *audit.Report `json:"report,omitempty"`
}

// verdicts are the rows of a copy in a table.
func (k *checkedCopy) verdicts() (rows [][]string) {
	for _, v := range []struct {
		what string
		audit.Verdict
	}{{"integrity", k.Report.Integrity}, {"completeness", k.Report.Completeness}, {"identity", k.Report.Identity}, {"time", k.Report.Time}} {
		rows = append(rows, []string{k.Copy, v.what, sayVerdict(v.Verdict)})
	}
	return rows
}

// checkCopy checks one copy, against what was signed of the log that it must be
// of; ok is false when that is another's than the workload which was asked for.
// What ended before another log took its place need not be whole, and which of
// the earlier heads is of it only its records show: without one that fits it is
// not confirmed.
func checkCopy(name string, trust audit.Trust) (k checkedCopy, ok bool, err error) {
	k.Copy = filepath.Base(name)
	base, old := currentName(k.Copy)
	heads, owner := audit.HeadsOf(trust.Heads, base)
	of := trust.Workload
	if trust.Heads = heads; len(heads) > 0 {
		trust.Workload, k.Owner = owner.Workload, owner.String()
	}
	if !of.IsZero() && trust.Workload != of {
		return k, false, nil
	}
	if old {
		trust.Workload = spiffeid.ID{}
	}
	rep, err := audit.VerifyFile(name, trust)
	if err != nil && !errors.Is(err, audit.ErrBroken) {
		return k, false, err
	}
	k.Report = &rep
	return k, true, nil
}

// looseLines counts the lines that do not continue a copy, if there are any.
func looseLines(name string) (int, error) {
	b, err := os.ReadFile(name + looseSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return bytes.Count(b, []byte("\n")), err
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
		k, ok, err := checkCopy(name, trust)
		if err != nil {
			return usage(err)
		}
		if here[k.Copy] = true; !ok {
			continue
		}
		out, rows = append(out, k), append(rows, k.verdicts()...)
		if k.Report.Err() != nil {
			bad++
		} else if !k.Report.Confirmed() {
			doubt++
		}
		n, err := looseLines(name)
		if err != nil {
			return usage(err)
		}
		if n > 0 {
			doubt++
			base := k.Copy + looseSuffix
			out = append(out, checkedCopy{Copy: base, Owner: k.Owner, Loose: n})
			rows = append(rows, []string{base, "all", fmt.Sprintf("unconfirmed  not covered: %d lines that do not continue the copy, and that nothing vouches for", n)})
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
	return strings.Replace(filepath.Base(path), ".jsonl", "", 1) + "  "
}
