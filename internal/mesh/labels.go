package mesh

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Labels are names with values, such as "version=v2,zone=eu-1": sorted by name,
// each once. As text they can be compared, and be part of a key.
type Labels string

// The labels that have a meaning of their own beside what subsets name.
const (
	LabelVersion = "version"
	LabelZone    = "zone"
)

// maxLabels bounds the labels of an endpoint or a subset.
const maxLabels = 16

// NewLabels checks and writes labels.
func NewLabels(m map[string]string) (Labels, error) {
	if len(m) > maxLabels {
		return "", fmt.Errorf("%d labels are more than %d", len(m), maxLabels)
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(m)) {
		if err := checkLabelPair(name, m[name]); err != nil {
			return "", err
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(name + "=" + m[name])
	}
	return Labels(b.String()), nil
}

func checkLabelPair(name, value string) error {
	switch {
	case !plainWord(name, 63):
		return fmt.Errorf("label %q: a name is 1 to 63 letters, digits, hyphens, dots or underscores", clip(name))
	case !plainWord(value, 63):
		return fmt.Errorf("label %s: value %q is not 1 to 63 letters, digits, hyphens, dots or underscores", name, clip(value))
	}
	return nil
}

// UnmarshalText reads "version=v2,zone=eu-1", in whatever order.
func (l *Labels) UnmarshalText(text []byte) error {
	m := map[string]string{}
	for pair := range strings.SplitSeq(string(text), ",") {
		name, value, ok := strings.Cut(strings.TrimSpace(pair), "=")
		if !ok {
			return fmt.Errorf("label %q is not NAME=VALUE", clip(pair))
		}
		if _, twice := m[name]; twice {
			return fmt.Errorf("label %q is written twice", clip(name))
		}
		m[name] = value
	}
	read, err := NewLabels(m)
	*l = read
	return err
}

// Check accepts what NewLabels writes.
func (l Labels) Check() error {
	again, err := NewLabels(l.Map())
	if err == nil && again != l {
		err = errors.New("labels are not sorted, or one is there twice")
	}
	return err
}

// Map is the labels as NewLabels takes them.
func (l Labels) Map() map[string]string {
	if l == "" {
		return nil
	}
	m := map[string]string{}
	for pair := range strings.SplitSeq(string(l), ",") {
		name, value, _ := strings.Cut(pair, "=")
		m[name] = value
	}
	return m
}

// Get is the value of a label, empty when there is none.
func (l Labels) Get(name string) string {
	for pair := range strings.SplitSeq(string(l), ",") {
		if value, ok := strings.CutPrefix(pair, name); ok && value != "" && value[0] == '=' {
			return value[1:]
		}
	}
	return ""
}

// Has reports whether all labels of a subset are there.
func (l Labels) Has(want map[string]string) bool {
	for name, value := range want {
		if l.Get(name) != value {
			return false
		}
	}
	return true
}
