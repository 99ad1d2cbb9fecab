package audit

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Trust is what VerifyFile believes beside the log. With the zero Trust a log
// can be found broken, but not confirmed.
type Trust struct {
	// Witnesses are the verifier keys of those who cosign logs.
	Witnesses []string
	// Heads are what they have signed last. They are checked, too.
	Heads []Head
	// Workload is whose log it must be. Default: anybody's.
	Workload spiffeid.ID
}

// signedSlack is how far the clock of a machine may be ahead of a witness's.
const signedSlack = time.Minute

// A claim is what somebody has signed of a log.
type claim struct {
	Checkpoint
	who string
	key string // of the log
	// at is when a witness signed it; zero when none has.
	at time.Time
	// outside of the machine: what is on it may be put back as a whole.
	outside bool

	// What the log has there.
	seen bool
	root tlog.Hash
	time time.Time
}

// A confirmer holds a log against what was signed of it.
type confirmer struct {
	trust  Trust
	claims []*claim
	// cosigned is the cosigned checkpoint as it was read.
	cosigned []byte
	tree     spine
	gone     goneCheck
	// passed is the newest claim of a witness that speaks of removed records
	// alone, nil when there is none.
	passed *claim
	// keyed: the key of the log is known.
	keyed bool
	// own verifies what the log has signed itself; nil when its key is not known.
	own note.Verifier
	// refusal is why a signature was not good, unknown why there is no claim of
	// a witness.
	refusal, unknown string
}

// VerifyFile verifies all files of the log at path as one chain, with its
// checkpoints, and holds it against what witnesses have signed.
func VerifyFile(path string, trust Trust) (Report, error) {
	c, files, err := takeUp(path, trust)
	if err != nil {
		return Report{}, err
	}
	defer closeAll(files)
	rs := make([]io.Reader, len(files))
	for i, f := range files {
		rs[i] = f
	}
	v := verifier{each: c.line, gone: c.gone.removal}
	rep, err := v.read(io.MultiReader(rs...))
	if err != nil && !errors.Is(err, ErrBroken) {
		return rep, err
	}
	c.judge(&rep)
	return rep, rep.Err()
}

// open opens the files of a log that is perhaps being written: a file may be put
// aside or removed at any moment. What is opened belongs together when nothing
// has changed meanwhile.
func (c *confirmer) open(path string) (files []*os.File, err error) {
	for range 10 {
		if err := c.begin(path); err != nil {
			return nil, err
		}
		names, err := c.segments(path)
		if err != nil {
			return nil, err
		}
		files, err = openAll(names)
		gone, keptErr := kept(path)
		again, listErr := c.segments(path)
		if err == nil && keptErr == nil && listErr == nil && bytes.Equal(gone.signed, c.gone.signed) && slices.Equal(names, again) {
			return files, nil
		}
		closeAll(files)
		if err := errors.Join(keptErr, listErr); err != nil {
			return nil, err
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("open audit log: %w", err)
		}
	}
	return nil, changesTooFast(path)
}

// segments lists the files but those that are gone by the evidence, which a crash
// may have left.
func (c *confirmer) segments(path string) ([]string, error) {
	names, err := Segments(path)
	return slices.DeleteFunc(names, func(name string) bool { return c.gone.covers(path, name) }), err
}

func openAll(names []string) (files []*os.File, err error) {
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// takeUp reads what was signed of a log, and opens its files. Between the two a
// witness may have signed more, and what it signed may have been removed: then
// what was read is no rewritten log's, but an old one.
func takeUp(path string, trust Trust) (*confirmer, []*os.File, error) {
	for range 10 {
		c := &confirmer{trust: trust}
		if err := c.gather(TreeDir(path)); err != nil {
			return nil, nil, err
		}
		files, err := c.open(path)
		if err != nil || c.passed == nil {
			return c, files, err
		}
		now, err := os.ReadFile(filepath.Join(TreeDir(path), cosignedFile))
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		if err == nil && bytes.Equal(now, c.cosigned) {
			return c, files, nil
		}
		closeAll(files)
		if err != nil {
			return nil, nil, fmt.Errorf("read audit tree: %w", err)
		}
	}
	return nil, nil, changesTooFast(path)
}

func changesTooFast(path string) error {
	return fmt.Errorf("open audit log: the files of %s change too fast; try again", path)
}

// gather reads the checkpoints beside the log, and finds the heads that speak
// of it.
func (c *confirmer) gather(dir string) error {
	for _, k := range c.trust.Witnesses {
		if _, err := parseWitnessKey(k); err != nil {
			return err
		}
	}
	key, err := os.ReadFile(filepath.Join(dir, verifierFile))
	if errors.Is(err, fs.ErrNotExist) {
		return c.heads(nil)
	}
	if err != nil {
		return fmt.Errorf("read audit tree: %w", err)
	}
	own := strings.TrimSpace(string(key))
	public, err := publicKey(own)
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(dir, verifierFile), err)
	}
	c.keyed = true
	if c.own, err = note.NewVerifier(own); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(dir, verifierFile), err)
	}
	for file, who := range map[string]string{checkpointFile: "the checkpoint", cosignedFile: "the cosigned checkpoint"} {
		b, err := os.ReadFile(filepath.Join(dir, file))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read audit tree: %w", err)
		}
		k := own
		if file == cosignedFile {
			c.cosigned = b
			name, _, _ := strings.Cut(string(b), "\n")
			k = verifierText(name, public)
		}
		c.add(b, k, who, file == cosignedFile, false)
	}
	return c.heads(public)
}

// add takes a signed checkpoint for a claim, or notes what is wrong with it.
func (c *confirmer) add(signed []byte, key, who string, wantWitness, outside bool) {
	cp, at, err := OpenCosigned(signed, key, c.trust.Witnesses)
	switch {
	case errors.Is(err, errNoWitness) && !wantWitness:
	case errors.Is(err, errNoWitness):
		c.unknown = who + " is not signed by a witness whose key was given"
	case err != nil:
		c.refusal = who + ": " + err.Error()
		return
	}
	c.claims = append(c.claims, &claim{Checkpoint: cp, who: who, key: key, at: at, outside: outside && !at.IsZero()})
}

// heads takes what witnesses have signed of the log with this key; of any log
// when there is none.
func (c *confirmer) heads(public []byte) error {
	for _, newest := range c.trust.Heads {
		for _, h := range append([]Head{newest}, newest.Before...) {
			p, err := publicKey(h.Key)
			if err != nil {
				return fmt.Errorf("head of %s: %w", h.Name, err)
			}
			if public != nil && !bytes.Equal(p, public) {
				continue
			}
			if o, ok := ParseLogName(h.Name); !c.trust.Workload.IsZero() && (!ok || o.Workload != c.trust.Workload) {
				continue
			}
			c.add(h.Note, h.Key, "the issuer's head of "+h.Name, true, true)
		}
	}
	slices.SortStableFunc(c.claims, func(a, b *claim) int { return cmp.Compare(a.Size, b.Size) })
	return nil
}

// line adds one line to the tree and notes how it stands at each claim.
func (c *confirmer) line(l *read) {
	c.tree.add(l.leaf)
	c.gone.line(l)
	c.stand(l.rec.Time)
}

// stand notes how the tree is at each claim.
func (c *confirmer) stand(at time.Time) {
	i, _ := slices.BinarySearchFunc(c.claims, c.tree.size, func(a *claim, n uint64) int { return cmp.Compare(a.Size, n) })
	for ; i < len(c.claims) && c.claims[i].Size == c.tree.size; i++ {
		c.claims[i].seen, c.claims[i].root, c.claims[i].time = true, c.tree.root(), at
	}
}

// judge adds to the verdicts what the claims say.
func (c *confirmer) judge(rep *Report) {
	if !c.keyed {
		c.onlyOurs()
	}
	defer c.gone.judge(rep, c.trust.Witnesses)
	var best *claim
	outside := false
	for _, a := range c.claims {
		switch {
		case !a.seen:
			rep.Completeness.fail(0, "%s speaks of %d records, the log has %d: its end was cut off", a.who, a.Size, c.tree.size)
		case a.root != tlog.Hash(a.Root):
			rep.Integrity.fail(0, "the tree over the first %d records is not what %s says: records were changed", a.Size, a.who)
		}
		if !a.at.IsZero() {
			best, outside = a, outside || a.outside
		}
	}
	if rep.Identity = (Verdict{OK: true}); c.refusal != "" {
		rep.Identity.fail(0, "%s", c.refusal)
	}
	if best == nil && c.passed != nil && (c.own != nil || c.gone.witnessed(c.trust.Witnesses) != nil) {
		// Nothing goes from a log before a witness has signed as much: who made
		// this evidence has the key of the log, and no witness has seen it. From a
		// copy nothing goes without the signature of a witness on the evidence, so
		// that to take the tree away makes no copy of a log.
		rep.Completeness.fail(0, "%s is of %d records, and the evidence says that %d were removed, which no witness has signed: the log was rewritten, or what was given is older than the removal and the cosigned checkpoint is missing",
			c.passed.who, c.passed.Size, c.gone.Last)
	}
	if best == nil {
		why := c.unknown
		switch {
		case len(c.trust.Witnesses) == 0:
			why = "no key of a witness was given"
		case why == "":
			why = "no witness has signed this log, as far as is known here"
		}
		rep.Completeness.doubt("nothing missing in between, but %s: the end may have been cut off", why)
		rep.Identity.doubt("%s", why)
		rep.Time.doubt("in order, but %s", why)
		return
	}
	c.confirm(rep, best, outside)
}

// onlyOurs finds the claims that speak of a copy without a tree. A workload has
// a log on each node and after each loss of one: what fits says which of them
// this is. When nothing fits and the workload is known, all of them count.
func (c *confirmer) onlyOurs() {
	fits := func(a *claim) bool { return a.seen && a.root == tlog.Hash(a.Root) }
	ours := map[string]bool{}
	for _, a := range c.claims {
		ours[a.key] = ours[a.key] || fits(a)
	}
	known := slices.ContainsFunc(c.claims, fits)
	c.claims = slices.DeleteFunc(c.claims, func(a *claim) bool {
		if c.trust.Workload.IsZero() {
			return !fits(a)
		}
		return known && !ours[a.key]
	})
}

// confirm says what the newest claim of a witness shows.
func (c *confirmer) confirm(rep *Report, best *claim, outside bool) {
	at := best.at.UTC().Format(time.RFC3339)
	owner, ok := ParseLogName(best.Origin)
	switch {
	case !ok:
		rep.Identity.fail(0, "a witness has signed it under the name %q, which names nobody", cut(best.Origin, 120))
	case !c.trust.Workload.IsZero() && owner.Workload != c.trust.Workload:
		rep.Identity.fail(0, "it is the log of %s, not of %s", owner, c.trust.Workload)
	case rep.Identity.OK:
		rep.Identity.Detail = owner.String()
	}
	if best.seen && best.time.After(best.at.Add(signedSlack)) {
		rep.Time.fail(0, "record %d is of %s, a witness signed it at %s", best.Size, best.time.UTC().Format(time.RFC3339), at)
	}
	if !outside {
		rep.Completeness.doubt("complete up to record %d as it was at %s; ask the issuer whether it has signed more since", best.Size, at)
	}
	if rep.Completeness.OK {
		rep.Completeness.Detail = fmt.Sprintf("up to record %d, signed at %s; %d came after", best.Size, at, c.tree.size-best.Size)
	}
}

// publicKey is the key in the text of a verifier.
func publicKey(text string) ([]byte, error) {
	if _, err := note.NewVerifier(text); err != nil {
		return nil, fmt.Errorf("key of an audit log: %w", err)
	}
	_, rest, _ := strings.Cut(text, "+")
	_, data, _ := strings.Cut(rest, "+")
	return decodeKey(data)
}
