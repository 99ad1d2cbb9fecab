package test

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestConformWorkloadAPI runs the product's own check as a workload of a real
// sidecar; its last line is the result.
func TestConformWorkloadAPI(t *testing.T) {
	t.Parallel()
	w := newWorld(t, time.Minute)
	w.startIssuer()
	n := &node{name: "payment"}
	w.join(n)
	r := ask[runReply](w.startNode(n), "/run", []string{filepath.Join(bin, "sallyport"), "conform", "workload-api"})
	text := strings.TrimSpace(r.Output)
	t.Log("\n" + text)
	last := text[strings.LastIndexByte(text, '\n')+1:]
	var got struct {
		OK    bool
		Cases struct{ Tried, Passed, Failed, Skipped int }
	}
	if err := json.Unmarshal([]byte(last), &got); err != nil {
		t.Fatalf("the last line is no result: %v", err)
	}
	if r.Code != 0 || !got.OK || got.Cases.Failed != 0 || got.Cases.Tried < 25 {
		t.Errorf("it ended with %d: %+v", r.Code, got.Cases)
	}
}
