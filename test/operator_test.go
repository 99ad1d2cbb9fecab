package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// operate runs one command against the issuer and returns what it printed.
func (w *world) operate(line string) (string, error) {
	w.t.Helper()
	out, err := exec.Command(filepath.Join(bin, "sallyport"), append(strings.Fields(line), "--socket", w.path("issuer", "run", "api.sock"))...).CombinedOutput()
	return string(out), err
}

func TestAnOperatorManagesIdentities(t *testing.T) {
	w := newWorld(t, time.Minute)
	rows := "p, no-mint, local, svid.MintJWTSVID, spiffe://" + trustDomain + "/ns/secret/**, deny\n"
	if err := os.WriteFile(filepath.Join(w.policy, "admin.csv"), []byte(rows), 0o600); err != nil {
		t.Fatal(err)
	}
	issuer := w.startIssuer()
	const id = "spiffe://" + trustDomain + "/ns/ops/sa/cron"
	if out, err := w.operate("entry create " + id + " --id cron --selector unix:uid:5 --parent spiffe://" + trustDomain + "/spire/agent/join_token/ops"); err != nil {
		t.Fatalf("create: %v: %s", err, out)
	}
	issuer.stop()
	w.startIssuer()
	for _, c := range []struct{ line, says string }{
		{"entry show cron", "made 20"},
		{"svid mint " + id + " --audience a --ttl 30s", "for " + id},
		{"svid mint spiffe://" + trustDomain + "/ns/secret/sa/x --audience a", "row no-mint of admin.csv denies it"},
		{"svid mint " + id + " --ttl 30s --write " + w.path("minted"), "is in"},
		{"entry delete cron", "is deleted"},
		{"agent list", "ATTESTED BY"},
	} {
		if out, _ := w.operate(c.line); !strings.Contains(out, c.says) {
			t.Errorf("%s printed %q, want %q in it", c.line, out, c.says)
		}
	}
	log, err := os.ReadFile(w.path("issuer", "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"entry.BatchCreateEntry"`, `"entry.BatchDeleteEntry"`, `"no-mint"`} {
		if !strings.Contains(string(log), want) {
			t.Errorf("the audit does not hold %s", want)
		}
	}
}
