package sink

import (
	"os"
	"slices"
	"strings"
	"testing"

	"sallyport/internal/mesh"
)

// Every example of docs/audit.md is a configuration that is taken, and every
// kind has one.
func TestDocs(t *testing.T) {
	b, err := os.ReadFile("../../docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), "\n## Send it elsewhere\n")
	text, _, _ = strings.Cut(text, "\n## ")
	var seen []string
	for i, part := range strings.Split(text, "```") {
		conf, ok := strings.CutPrefix(part, "yaml\n")
		if i%2 == 0 || !ok || !strings.Contains(conf, "- name:") {
			continue
		}
		if !strings.HasPrefix(conf, "audit:") {
			conf = "audit:\n  sinks:\n" + conf
		}
		var c struct {
			Audit ListConfig `yaml:"audit"`
		}
		if err := mesh.DecodeYAML("audit.md", []byte(conf), &c); err != nil {
			t.Errorf("%v", err)
			continue
		}
		if err := c.Audit.Validate(); err != nil {
			t.Errorf("%s%v", conf, err)
			continue
		}
		for _, s := range c.Audit.Sinks {
			seen = append(seen, s.kinds()[0].name)
		}
	}
	slices.Sort(seen)
	if want := []string{"file", "http", "kafka", "otlp", "s3", "syslog"}; !slices.Equal(slices.Compact(seen), want) {
		t.Errorf("the examples show %v, want %v", seen, want)
	}
}

// A mistake in a configuration is shown with its line.
func TestMistakesHaveALine(t *testing.T) {
	var c struct {
		Audit ListConfig `yaml:"audit"`
	}
	err := mesh.DecodeYAML("c.yaml", []byte("audit:\n  sinks:\n    - name: a\n      kafka:\n        borkers: [a:1]\n"), &c)
	if err == nil || !strings.Contains(err.Error(), `c.yaml:5:9: unknown field "borkers": did you mean "brokers"?`) {
		t.Error(err)
	}
}
