package mux

import "testing"

// TestSpentIsOfThePartAlone tells who has taken all from who finds nothing left.
func TestSpentIsOfThePartAlone(t *testing.T) {
	all := NewBudget(100)
	greedy, modest := all.Part(60, 0), all.Part(60, 0)
	if !greedy.Take(60) || !modest.Take(30) {
		t.Fatal("a part is not had")
	}
	if modest.Take(20) {
		t.Error("more is had than there is")
	}
	if modest.Spent(20) || !greedy.Spent(1) || (*Budget)(nil).Spent(1) {
		t.Error("it is not the greedy one that has spent its part")
	}
}
