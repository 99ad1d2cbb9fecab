package audit

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	billingID = spiffeid.RequireFromString("spiffe://demo.test/ns/shop/sa/billing")
	paymentID = spiffeid.RequireFromString("spiffe://demo.test/ns/shop/sa/payment")
	nodeID    = spiffeid.RequireFromString("spiffe://demo.test/spire/agent/join_token/n1")
)

// signedLog is a log that a witness has signed.
type signedLog struct {
	path  string
	log   *Log
	tree  *Tree
	name  string
	heads *memHeads
	w     *Witness
	have  uint64
}

func newSignedLog(t *testing.T) *signedLog {
	s := &signedLog{path: filepath.Join(t.TempDir(), "audit.log"), heads: &memHeads{}, name: LogName(billingID, nodeID)}
	var err error
	if s.w, err = OpenWitness(t.TempDir(), s.heads); err != nil {
		t.Fatal(err)
	}
	s.log = openAt(t, s.path)
	s.tree = treeAt(t, s.log)
	return s
}

func (s *signedLog) grow(t *testing.T, n int) {
	t.Helper()
	mustAppend(t, s.log, n)
	mustUpdate(t, s.log, s.tree)
}

func (s *signedLog) cosign(t *testing.T) {
	t.Helper()
	q, _, err := s.tree.Ask(s.name, s.have)
	if err != nil {
		t.Fatal(err)
	}
	signed, have, err := s.w.Cosign(t.Context(), s.name, q)
	if err != nil || signed == nil {
		t.Fatal(have, err)
	}
	s.have = have
	if err := s.tree.Cosigned(s.name, signed); err != nil {
		t.Fatal(err)
	}
}

func (s *signedLog) trust(t *testing.T) Trust {
	t.Helper()
	tr := Trust{Witnesses: []string{s.w.Key()}}
	for _, b := range s.heads.m {
		h, err := ParseHead(b)
		if err != nil {
			t.Fatal(err)
		}
		tr.Heads = append(tr.Heads, h)
	}
	return tr
}

// say is the verdicts in order: p, f or u.
func say(r Report) string {
	out := ""
	for _, v := range []Verdict{r.Integrity, r.Completeness, r.Identity, r.Time} {
		switch {
		case v.OK:
			out += "p"
		case v.Unconfirmed:
			out += "u"
		default:
			out += "f"
		}
	}
	return out
}

// TestWhatAnAttackerCanDoToALog puts each attack on a node beside what the
// verifier says of it: integrity, completeness, identity, time.
func TestWhatAnAttackerCanDoToALog(t *testing.T) {
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, s *signedLog) Trust
		want string
	}{
		{"nothing", func(t *testing.T, s *signedLog) Trust { return s.trust(t) }, "pppp"},
		{"nothing, and records that are not signed yet", func(t *testing.T, s *signedLog) Trust { s.grow(t, 7); return s.trust(t) }, "pppp"},
		{"nothing, to who knows nobody", func(*testing.T, *signedLog) Trust { return Trust{} }, "puuu"},
		{"nothing, to who has the key of the witness but not its heads", func(_ *testing.T, s *signedLog) Trust {
			return Trust{Witnesses: []string{s.w.Key()}}
		}, "pupp"},
		{"nothing, to who trusts another witness", func(t *testing.T, _ *signedLog) Trust {
			w, err := OpenWitness(t.TempDir(), &memHeads{})
			if err != nil {
				t.Fatal(err)
			}
			return Trust{Witnesses: []string{w.Key()}}
		}, "puuu"},
		{"nothing, on the issuer's copy without a tree", func(t *testing.T, s *signedLog) Trust {
			os.RemoveAll(TreeDir(s.path))
			return s.trust(t)
		}, "pppp"},
		{"the end is cut off, the tree too", func(t *testing.T, s *signedLog) Trust {
			s.rewrite(t, func(b []byte) []byte { return cutLines(b, 5) })
			for _, f := range []string{checkpointFile, cosignedFile} {
				os.Remove(filepath.Join(TreeDir(s.path), f))
			}
			return s.trust(t)
		}, "pfpp"},
		{"the end of a copy without a tree is cut off", func(t *testing.T, s *signedLog) Trust {
			s.rewrite(t, func(b []byte) []byte { return cutLines(b, 5) })
			os.RemoveAll(TreeDir(s.path))
			tr := s.trust(t)
			tr.Workload = billingID
			return tr
		}, "pfpp"},
		{"the node is put back to an earlier day", func(t *testing.T, s *signedLog) Trust {
			old := t.TempDir()
			if err := os.CopyFS(old, os.DirFS(filepath.Dir(s.path))); err != nil {
				t.Fatal(err)
			}
			s.grow(t, 10)
			s.cosign(t)
			s.path = filepath.Join(old, filepath.Base(s.path))
			return s.trust(t)
		}, "pfpp"},
		{"the node is put back, and only its own word is heard", func(t *testing.T, s *signedLog) Trust {
			return Trust{Witnesses: []string{s.w.Key()}}
		}, "pupp"},
		{"history is written anew with the log's own key", func(t *testing.T, s *signedLog) Trust {
			s.rewrite(t, func([]byte) []byte {
				l := NewMemory()
				mustAppend(t, l, 40)
				return l.Lines()
			})
			for _, f := range []string{checkpointFile, "tile"} {
				os.RemoveAll(filepath.Join(TreeDir(s.path), f))
			}
			l := openAt(t, s.path)
			mustUpdate(t, l, treeAt(t, l))
			return s.trust(t)
		}, "fppp"},
		{"the key is stolen and shown as that of another workload", func(t *testing.T, s *signedLog) Trust {
			tr := s.trust(t)
			tr.Workload, tr.Heads = paymentID, nil
			return tr
		}, "pufp"},
		{"a cosignature is put under a longer log", func(t *testing.T, s *signedLog) Trust {
			name := filepath.Join(TreeDir(s.path), cosignedFile)
			old := mustRead(t, name)
			s.grow(t, 5)
			q, _, err := s.tree.Ask(s.name, 0)
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.SplitAfter(strings.TrimSuffix(string(old), "\n"), "\n")
			forged := string(q.Checkpoint) + lines[len(lines)-1] + "\n"
			if err := os.WriteFile(name, []byte(forged), 0o600); err != nil {
				t.Fatal(err)
			}
			return s.trust(t)
		}, "ppfp"},
		{"the clock was ahead when it was signed", func(t *testing.T, s *signedLog) Trust {
			r := Record{Kind: KindAdmin, Time: time.Now().Add(time.Hour)}
			if err := s.log.Append(&r); err != nil {
				t.Fatal(err)
			}
			mustUpdate(t, s.log, s.tree)
			s.cosign(t)
			return s.trust(t)
		}, "pppf"},
		{"the heads were changed on their way", func(t *testing.T, s *signedLog) Trust {
			tr := s.trust(t)
			tr.Heads[0].Note = append([]byte(nil), strings.Replace(string(tr.Heads[0].Note), "\n25\n", "\n24\n", 1)...)
			return tr
		}, "pufp"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSignedLog(t)
			s.grow(t, 20)
			s.cosign(t)
			s.grow(t, 5)
			s.cosign(t)
			trust := tt.do(t, s)
			rep, err := VerifyFile(s.path, trust)
			if got := say(rep); got != tt.want {
				t.Errorf("verdicts %s, want %s: %+v", got, tt.want, rep)
			}
			if strings.Contains(tt.want, "f") != errors.Is(err, ErrBroken) || (tt.want == "pppp") != rep.Confirmed() {
				t.Errorf("%v, confirmed %v", err, rep.Confirmed())
			}
		})
	}
}

func (s *signedLog) rewrite(t *testing.T, f func([]byte) []byte) {
	t.Helper()
	s.log.Close()
	if err := os.WriteFile(s.path, f(mustRead(t, s.path)), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestProofs(t *testing.T) {
	s := newSignedLog(t)
	s.grow(t, 700)
	s.cosign(t)
	s.grow(t, 20)
	trust := s.trust(t)
	for _, seq := range []uint64{1, 256, 257, 700, 701, 720} {
		p, err := Prove(s.path, seq)
		if err != nil {
			t.Fatal(seq, err)
		}
		b, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var read Proof
		if err := json.Unmarshal(b, &read); err != nil {
			t.Fatal(err)
		}
		got, err := read.Check(trust.Witnesses)
		if err != nil || got.Record.Seq != seq {
			t.Fatalf("record %d: %+v %v", seq, got, err)
		}
		if signed := seq <= 700; signed == got.Signed.IsZero() || signed != (got.Owner.Workload == billingID) {
			t.Errorf("record %d: %+v", seq, got)
		}
		for name, spoil := range map[string]func(*Proof){
			"another record": func(p *Proof) { p.Record = strings.Replace(p.Record, `"kind":"`, `"kind":"x`, 1) },
			"another number": func(p *Proof) { p.Seq++ },
			"another hash": func(p *Proof) {
				p.Hashes = append([][]byte{append([]byte{p.Hashes[0][0] ^ 1}, p.Hashes[0][1:]...)}, p.Hashes[1:]...)
			},
			"a short hash":       func(p *Proof) { p.Hashes = [][]byte{{1}} },
			"another checkpoint": func(p *Proof) { p.Checkpoint = strings.Replace(p.Checkpoint, "\n7", "\n8", 1) },
			"another key":        func(p *Proof) { p.Key = s.w.Key() },
			"no number":          func(p *Proof) { p.Seq = 0 },
		} {
			bad := read
			spoil(&bad)
			if got, err := bad.Check(trust.Witnesses); err == nil {
				t.Errorf("record %d with %s is proved: %+v", seq, name, got)
			}
		}
	}
	if _, err := Prove(s.path, 721); err == nil || !strings.Contains(err.Error(), "720") {
		t.Errorf("a record that is not there: %v", err)
	}
}

func TestLogNames(t *testing.T) {
	name := LogName(billingID, nodeID)
	if o, ok := ParseLogName(name); !ok || o.Workload != billingID || o.Agent != nodeID {
		t.Errorf("%s is read as %v", name, o)
	}
	if o, ok := ParseLogName(IssuerLogName(billingID.TrustDomain(), "one")); !ok || o.Issuer != "one" || !o.Workload.IsZero() {
		t.Errorf("read as %v", o)
	}
	for _, bad := range []string{"", "x", namePrefix, namePrefix + "td", namePrefix + "td/a@", namePrefix + "/a@b", namePrefix + "TD/a@b", namePrefix + "td/a@b@c", namePrefix + "td/a/../b@c", namePrefix + "/@i"} {
		if o, ok := ParseLogName(bad); ok {
			t.Errorf("%q is read as %v", bad, o)
		}
	}
}

func FuzzProof(f *testing.F) {
	f.Add(`{"seq":1,"record":"{}","hashes":["AA=="],"checkpoint":"a\n1\nb\n","key":"k"}`)
	f.Fuzz(func(t *testing.T, text string) {
		var p Proof
		if json.Unmarshal([]byte(text), &p) != nil {
			return
		}
		if got, err := p.Check(nil); err == nil {
			t.Errorf("%+v is proved by nobody", got)
		}
		ParseLogName(text)
	})
}

// A copy without a tree is held against the log that it is of, not against
// those that the workload has on other nodes.
func TestCopiesOfAWorkloadOnTwoNodes(t *testing.T) {
	a, b := newSignedLog(t), newSignedLog(t)
	b.w, b.heads = a.w, a.heads
	b.name = LogName(billingID, spiffeid.RequireFromString(nodeID.String()+"-two"))
	for i, s := range []*signedLog{a, b} {
		s.grow(t, 10*(i+1))
		s.cosign(t)
	}
	trust := a.trust(t)
	trust.Workload = billingID
	for i, s := range []*signedLog{a, b} {
		if err := os.RemoveAll(TreeDir(s.path)); err != nil {
			t.Fatal(err)
		}
		if rep, err := VerifyFile(s.path, trust); err != nil || say(rep) != "pppp" {
			t.Errorf("log %d: %s, %v, %+v", i, say(rep), err, rep)
		}
		s.rewrite(t, func(b []byte) []byte { return cutLines(b, 5) })
		if rep, err := VerifyFile(s.path, trust); err == nil || rep.Completeness.OK || rep.Completeness.Unconfirmed {
			t.Errorf("log %d, cut: %s, %v", i, say(rep), err)
		}
	}
}
